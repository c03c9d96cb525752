"""Measure whether transfer, layer by layer, saves tokens before distillation: both arms learn from as many tokens in all.

One arm distils from the first step, the others spend a share of the steps on transfer before. Each arm begins from the same student and
reads the same text in the same order of seeds. Printed every `--eval_steps` of distillation: the divergence from the teacher on held-out
text, in nats a token, over all targets and over those beyond the window, and the tokens that were learned from until then.

The same command again continues after the last checkpoint of the arm that was under way. The folder keeps the settings, a file for each
finished arm, and `transfer.json`, the record of all of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import Dataset

import _timing  # noqa: F401  (puts src on the path)
from refine_nsp.evaluation.run import claim_folder
from refine_nsp.files import write_atomically
from refine_nsp.models.load import load
from refine_nsp.training import DataArguments, ReFINEConfig, ReFINETrainer, prepare_data
from refine_nsp.training.run_folder import RunFolder


def config_of(args: argparse.Namespace, folder: Path, objective: str, steps: int, rate: float) -> ReFINEConfig:
    """Return the settings of one phase of an arm."""
    return ReFINEConfig(
        output_dir=str(folder),
        objective=objective,
        teacher=args.teacher,
        max_steps=steps,
        max_length=args.max_length,
        per_device_train_batch_size=args.batch,
        learning_rate=args.learning_rate if objective == "distill" else rate,
        fast_weight_learning_rate=rate if objective == "distill" else None,
        lambda_ntp=0.0,
        lr_scheduler_type="linear",
        warmup_steps=min(10, steps // 4),
        eval_strategy="steps" if objective == "distill" else "no",
        eval_steps=args.eval_steps,
        logging_steps=max(1, steps // 10),
        save_strategy="steps",
        save_steps=args.eval_steps,
        save_total_limit=1,
        report_to="none",
        bf16=args.bf16,
        seed=args.seed,
    )


def arm(args: argparse.Namespace, share: float, rows: tuple[Dataset, Dataset], folder: Path) -> list[dict[str, float]]:
    """Train one arm, which transfers for a share of the steps and distils for the rest; return its figures by tokens.

    A phase that an earlier process has begun, or ended, is taken up where that left it.
    """
    model, tokenizer = load(args.student, dtype="float32")
    transferred = round(share * args.steps)
    found: list[dict[str, float]] = []
    for objective, steps, done, rate in (
        ("transfer", transferred, 0, args.transfer_learning_rate),
        ("distill", args.steps - transferred, transferred, args.fast_weight_learning_rate),
    ):
        if steps == 0:
            continue
        model.requires_grad_(True)  # transfer froze all but the memory
        settings = config_of(args, folder / objective, objective, steps, rate)
        trainer = ReFINETrainer(model, settings, train_dataset=rows[0], eval_dataset=rows[1], processing_class=tokenizer)
        # Training begins a log of its own, so what was measured before it is kept here.
        logs = [{**trainer.evaluate(), "step": 0}] if objective == "distill" else []
        last = RunFolder(folder / objective).last_complete()
        trainer.train(resume_from_checkpoint=False if last is None else str(last))
        for log in logs + trainer.state.log_history:
            if "eval_kl_beyond" in log:
                tokens = (done + log["step"]) * args.batch * args.max_length
                found.append(
                    {"tokens": tokens, "kl": log["eval_kl"], "kl_beyond": log["eval_kl_beyond"], "loss": log["eval_loss"]}
                )
                print(f"share {share:g}  {json.dumps(found[-1])}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", required=True, help="a folder that `refine-nsp convert` made of the teacher")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--text_column", default="text")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[0.0, 0.25, 0.5], help="of the steps that are transfer, one arm each"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--eval_steps", type=int, default=25)
    parser.add_argument("--eval_windows", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-5, help="of pretrained weights, in distillation")
    parser.add_argument("--fast_weight_learning_rate", type=float, default=1e-3, help="of the memory, in distillation")
    parser.add_argument("--transfer_learning_rate", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/transfer"))
    args = parser.parse_args()
    data = DataArguments(dataset_name=args.dataset, text_column=args.text_column, validation_windows=args.eval_windows)
    train, held = prepare_data(data, load(args.student)[1], args.max_length, args.max_length // 2, False, False)
    assert isinstance(train, Dataset) and isinstance(held, Dataset)
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("shares", "output")}
    claim_folder(args.output, settings)
    found: dict[str, list[dict[str, float]]] = {}
    for share in args.shares:
        name = f"{share:g}"
        done = args.output / f"share-{name}.json"
        if not done.exists():
            figures = arm(args, share, (train, held), args.output / f"share-{name}")
            write_atomically(done, json.dumps(figures, indent=1) + "\n")
        found[name] = json.loads(done.read_text(encoding="utf-8"))
        write_atomically(args.output / "transfer.json", json.dumps({"settings": settings, "arms": found}, indent=1) + "\n")
    print("share of transfer   last KL beyond the window")
    for share, figures in found.items():
        print(f"{share:>17s}   {figures[-1]['kl_beyond']:.4f}")


if __name__ == "__main__":
    main()
