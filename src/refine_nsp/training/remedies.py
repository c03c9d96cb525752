"""Advise what to set differently when memory runs out, by the part of a step that asked for too much (`ops/memory.py`).

Lower rooms name the parts; only here is it known which settings of a run make them smaller.
"""

VALIDATION = {"validation": "lower per_device_eval_batch_size or max_length"}
TRAINING = {
    "forward": "set gradient_checkpointing or segment_tokens, or lower per_device_train_batch_size or max_length",
    "context": "lower per_device_train_batch_size or local_window, or keep the scores with the data: context_scores=cached",
    "teacher": "lower per_device_train_batch_size or max_length, or keep the teacher's scores with the data: context_scores=teacher",
    "logits": "lower per_device_train_batch_size or max_length",
    "rollouts": "lower num_generations, positions_per_sequence or per_device_train_batch_size",
    "backward": "set gradient_checkpointing or segment_tokens, or lower per_device_train_batch_size, num_generations or max_length",
    "optimizer": "set use_peft or an optim with a smaller state (adafactor), or share the state out (recipes/accelerate, FSDP)",
} | VALIDATION
# A prompt is adapted to alone or with few others, and as it is: it has no batch size and no greatest length of its own.
TEST_TIME = {
    "forward": "set segment_tokens, or adapt to shorter prompts",
    "context": "lower local_window, or adapt to shorter prompts",
    "logits": "adapt to shorter prompts",
    "rollouts": "lower num_generations or positions_per_sequence",
    "backward": "set segment_tokens or parameters=fast_weights, lower num_generations, or adapt to shorter prompts",
    "optimizer": "set parameters=lora or fast_weights, or optimizer=sgd",
}
