"""Keys and values of generated documents are drawn at random: numbers, uuids, and pairs of an adjective and a noun as RULER has them.

No word here (but one in 10,000 of those made of parts) is in the lists of `wonderwords` that RULER draws from, so its keys are new to a
model that is trained on these. Some words stand in the default text; most are made of parts, so that no key can be known by heart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from refine_nsp.prompts.ruler_words import draw_word

ADJECTIVES = (
    "absolute abstract active additional alternate arbitrary basic binary bounded buffered cached cancelled canonical captured cleared "
    "combined compact compatible compiled compressed computed configured connected consistent converted copied declared decorated "
    "decoded deprecated detached embedded enclosed encoded escaped exact executable existing expanded explicit extended extracted "
    "filtered finite fixed floating formatted frozen generic global grouped hidden horizontal identical implicit inactive incremental "
    "indented inherited inner inserted installed invalid inverted isolated iterable joined keyed linear linked literal locked "
    "logged logical lower mapped masked matched merged minimal missing modified multiple mutable named negative nested numerical "
    "optional ordered outer packed padded paired parallel parsed partial pending persistent pickled portable positive preferred previous "
    "printable qualified queued quoted random readable recursive redirected registered remaining repeated required reserved resolved "
    "reversed rounded sampled saved scheduled selected sequential shared signed sorted specific static stored strict symbolic "
    "synchronous terminated threaded traced trailing transparent truncated typed unbound unused updated valid verbose vertical virtual "
    "visible weighted wrapped writable zipped"
).split()
NOUNS = (
    "addresses aliases arguments arrays articles attributes blocks borders brackets branches browsers buffers buttons bytes caches calls "
    "candles channels chapters characters children chunks circles classes clients clocks codes collections colors columns commands "
    "comments conditions connections constants contents coordinates copies corners counters cursors cycles dates days defaults degrees "
    "delays details devices dictionaries digits directories documents domains drivers duplicates edges elements endings engines entries "
    "errors events examples exceptions extensions failures features fields files filters folders formats fragments frames functions "
    "generators groups guards handlers headers heaps hosts hours icons identifiers images imports instances integers interfaces "
    "iterators jobs journals keys labels layers letters levels libraries limits lines links lists locales locks loops machines managers "
    "maps margins markers masks matches measures members menus messages methods minutes modules months names networks nodes notes "
    "numbers objects offsets operands operations options orders outputs owners packages pages pairs panes parameters parents parsers "
    "parts passes passwords paths patterns peers phases pipes pixels platforms players points polygons ports positions prefixes printers "
    "priorities processes products profiles programs projects prompts properties protocols purposes queries queues quotes ranges ratios "
    "readers reasons records regions registers releases reports requests resources results roots routes routines rows rules runs samples "
    "scales schemes scopes screens scripts seasons seconds sections selectors separators sequences servers services sessions settings "
    "shapes shelves shells signals signs sizes slices slots sockets sources spaces speeds stacks stages stamps states statements "
    "stations steps stores streams strings structures styles subjects suffixes summaries switches symbols systems tables tabs tags "
    "targets tasks teams templates tests themes things threads timers times titles tokens tools traces tracks trees tuples turns types "
    "units users values variables vectors versions views volumes walks weekdays weights widgets windows words workers worlds writers "
    "years zones"
).split()
# Onset, vowel, coda and an ending make a word. Of 100,000 words made of these, `wonderwords` knows a dozen.
ONSETS = "bl br cl cr d dr fl fr gl gr j k l m n p pl pr sl sm sn sp st str sw tr tw v w z".split()
VOWELS = "a ai e ea i o oo ou u".split()
CODAS = "d ft ld lf lk lm lp lt p rb rd rf rg rl rm rn rp sh sp th x z".split()
ADJECTIVE_ENDINGS = (
    "able acious adic al ane ant ar ard arian atic ative atory ble ce ed eed en end ent er ernal ern escent esque est etic ful iant ible "
    "ic ical id ient ific ile ilian imate ine ing ious ish ist istic ite itive itory ive ivial less like ly ming most noid nal ond oid "
    "olic oral orn oral ose otic ous ral right rous ry some sonic sy tal ten thy tic tical tive trous ual ular und unct uous ural ure "
    "urban urn ute valent vant ward ways wise worthy y"
).split()
NOUN_ENDINGS = (
    "ace acity ade age al ament ance and ant arium ary ate ation ator back ball bird board book bow box bread cage cake cap castle cloth "
    "coat craft cup dom duct eel ella ence end er ery et ette field fish foot form gate glass ground guard hand head hold hood horn house "
    "ice ine ion ism ist ity kin land let light line ling lock mate ment mill nest ness nut oir oon or ory paper pole pot rack ship "
    "shore side smith stick stone sure tail tion top trap tude ture ula um ure urn wagon wall ware water way wheel wood work worm yard"
).split()


def made_word(rng: random.Random, endings: Sequence[str]) -> str:
    """Make a word that nobody has seen, such as `grarnet` with the endings of nouns."""
    return rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) + rng.choice(endings)


def draw(rng: random.Random, kind: str) -> str:
    """Draw a value of RULER's `numbers` or `uuids`, or a pair of words such as RULER's `words`."""
    if kind != "words":
        return draw_word(rng, kind)
    # Nouns are nearly always made of parts, since the default text's share a plural ending that RULER's do not have.
    adjective = rng.choice(ADJECTIVES) if rng.random() < 0.5 else made_word(rng, ADJECTIVE_ENDINGS)
    noun = rng.choice(NOUNS) if rng.random() < 0.1 else made_word(rng, NOUN_ENDINGS)
    return f"{adjective}-{noun}"
