# SPDX-License-Identifier: Apache-2.0
"""Detectors of harmful requests and of harmful answers in English: logistic regression on wording.

`scripts/train_harm_detector.py` fits both and writes `harm.json`: weights of words, word pairs and
patterns, sources, and precision and recall on texts that were left out, by kind of prompt.
"""

from __future__ import annotations

import functools
import json
import math
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARAMETERS = Path(__file__).with_name("harm.json")

_LOOKALIKES = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u04bb\u0501\u051b\u051d\u0432"
    "\u043a\u043c\u043d\u0442\u0433\u03b1\u03bf\u03b5\u03c1\u03c4\u03c5\u03bd\u03b9\u03ba\u03b7"
    "\u03c7\u0131\u0142\u00f8\u0111\u0261",
    "aeopcyxijshdqwbkmhtraoeptuvikhxilodg",
)
"""Cyrillic, Greek and barred letters -> the Latin ones that they look like."""
_LEET = str.maketrans("013457@$!|", "oieastasil")
_STRAIGHT = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")
_TOKEN = re.compile(r"\S+")
_MIXED = re.compile(r"(?=\S*[a-z])[a-z013457@$!|]*[013457@$|][a-z013457@$!|]*(?=[\W_]*$)")
_SPACED = re.compile(
    r"(?<![^\W_])[a-z](?: [a-z](?: {1,2}[a-z])+|([._*-])[a-z](?:\1[a-z])*)(?![^\W_])"
)
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_SENTENCE = re.compile(r"(?<=[.!?:;])[\"')]*\s+|\n+")

_PERSON = (
    r"(?:some(?:one|body)|any(?:one|body)|people|persons?|m[ae]n|wom[ae]n|boys?|girls?|kids?"
    r"|child(?:ren)?|bab(?:y|ies)|him|them|her|humans?|myself|yourself|himself|students?"
    r"|teachers?|cops?|police\w*|immigrants?|crowds?|presidents?|politicians?|victims?|homeless"
    r"|my (?:\w+ )?(?:ex|wife|husband|boss|neighbou?rs?|classmates?|friends?|girlfriend|boyfriend"
    r"|m[ou]m|mother|dad|father|brother|sister|parents|colleagues?|roommate|partner|family|enem\w+"
    r"|coworkers?|landlord|employees?))"
)
_GROUP = (
    r"(?:wom[ae]n|men|females?|blacks?|black (?:people|men|women)|whites?|jew\w*|muslims?"
    r"|christians?|immigrants?|gays?|lesbians?|trans\w*|disabled|divorced|old people|elderly"
    r"|mexicans?|asians?|africans?|arabs?|hispanics?|chinese|indians?|poor people|minorit\w+|race"
    r"|refugees|people (?:of|from|with) \w+|\w+ people)"
)
_VIOLENT = (
    r"(?:kill\w*|murder\w*|shoot\w*|stab\w*|poison\w*|strangl\w+|assassinat\w+|tortur\w+|kidnap\w*"
    r"|rap(?:e|ing)|assault\w*|beat(?:ing)?|blow(?:ing)? up|bomb\w*|behead\w*|execut\w+"
    r"|slaughter\w*|butcher\w*|smash\w*|crush\w*|destroy\w*|eliminat\w+|hurt\w*|attack\w*|harm\w*"
    r"|threaten\w*|stalk\w*|bully\w*|harass\w*|terminat\w+|take out|punch\w*|knock\w*|burn\w*)"
)
_DRUG = (
    r"(?:cocaine|heroin|meth\w*|crack|weed|lsd|ecstasy|mdma|fentanyl|opioids?|drugs?|ghb|roofies"
    r"|steroids)"
)
_NUMBER = (
    r"(?:social security|credit card|phone|bank|passport|licen[cs]e) numbers?|(?:home )?address"
    r"|e-?mail(?: address)?|dates? of birth|birthday|marital status|medical (?:records?|history)"
    r"|passwords?|salary|sexual (?:orientation|preferences?)|income|political (?:views|affiliation)"
)
_PRIVATE = (
    r"(?:my|our|his|her|their) (?:\w+ )?(?:neighbou?r|boss|teacher|cleaner|classmate|friend|ex|wife"
    r"|girlfriend|boyfriend|colleague|coworker|doctor|landlord|mother|sister|brother|manager"
    r"|ex-\w+|\w+er|\w+or|\w+ist|\w+man)"
)
_PATTERNS = {
    "asks for a way": r"^\W*(?:how (?:do|can|could|should|would|to|might)\b|(?:what (?:is|are|'s) |"
                      r"what's )(?:\w+ ){0,2}(?:ways?|tricks?|methods?|steps|tips?|techniques?)\b"
                      r"|where (?:can|do|could|should) (?:i|you|we)\b|tell me how|teach me|show me"
                      r"|help me|i (?:want|need|would like) to)",
    "asks for a text": r"^\W*(?:write|create|develop|provide|give|make|generate|draft|design"
                       r"|instruct|outline|produce|publish|show|teach|explain how|describe how)\b",
    "asks for a meaning": r"^\W*(?:what (?:is|are|does|do)|what's|define|explain|describe)\b.{0,40}"
                          r"\b(?:definition|meaning|mean|means|define|concept|term|difference)\b"
                          r"|^\W*(?:what (?:is|are)|what's) (?:an? |the )?[\w-]+\W*$"
                          r"|^\W*define\b",
    "asks for a fact": r"^\W*(?:what|which|who|when|where|why|how many|how) (?:\w+ )?(?:happened"
                       r"|was|were|did|caused|led)\b|^\W*(?:who|when|which|how many)\b",
    "asks why": r"^\W*why\b",
    "should": r"\bshould\b",
    "violence to people": rf"\b{_VIOLENT}\b(?:\W+\w+){{0,2}}?\W+{_PERSON}\b",
    "violence": rf"\b{_VIOLENT}\b",
    "people": rf"\b{_PERSON}\b",
    "in a game or story": r"\b(?:call of duty|gta|grand theft auto|minecraft|fortnite|hitman"
                          r"|counter-?strike|halo|zelda|skyrim|pokemon|chess|poker|monopoly"
                          r"|(?:video ?)?games?|movies?|films?|novels?|books?|play|story|fiction\w*"
                          r"|series|episode|season|characters?|theat(?:er|re)|football|soccer"
                          r"|basketball|baseball|hockey|tennis|rugby|wrestling|boxing|opera"
                          r"|improv|match|tournament|stage)\b",
    "of machines": r"\b(?:python|linux|windows|process\w*|programs?|threads?|code|server|servers"
                   r"|database|files?|scripts?|apps?|lights?|battery|engine|machines?|spreadsheet"
                   r"|contract|presentation|exam|interview|deadline|market|party|dish|recipe|crowd"
                   r"|joke|workout|set|personal record|record|c)\b",
    "of plants and animals": r"\b(?:weeds?|garden|mosquito\w*|bugs?|insects?|rats?|mice|ants?"
                             r"|cockroach\w*|bacteria|germs|plants?|fish|balloons?|bees?|wasps?"
                             r"|grass|fruit|virus\w*|cells?|pests?|fleas?)\b",
    "theft": r"\b(?:steal\w*|stole|rob(?:bing|bery)?|shoplift\w*|burgl\w+|break(?:ing)? in(?:to)?"
             r"|hack\w*|embezzl\w+|launder\w*|counterfeit\w*|forg(?:e|ing|ed)|blackmail\w*|extort\w*"
             r"|scam\w*|phish\w*|fraud\w*|identity theft|cheat\w*|bypass\w*|evad\w+|plagiari\w+"
             r"|pirat\w+|malware|ransomware|virus|viruses|exploit\w*|insider trading|tax evasion"
             r"|smuggl\w+|traffick\w*|bribe\w*|crack)\b",
    "drugs": rf"\b(?:make|cook|buy|sell|get|snort|smok|inject|produc|manufactur|grow|smuggl|deal"
             rf"|tak|distribut)\w*\b(?:\W+\w+){{0,3}}?\W+{_DRUG}\b",
    "names a drug": rf"\b{_DRUG}\b",
    "weapons": r"\b(?:bombs?|explosives?|weapons?|guns?|firearms?|grenades?|ammunition|poison"
               r"|bioweapon|anthrax|molotov|dynamite|napalm)\b",
    "self-harm": r"\b(?:kill(?:ing)? (?:myself|yourself)|suicid\w+|end (?:my|your) life|self.?harm"
                 r"|cut(?:ting)? myself|anorexi\w+|starv\w+ (?:myself|yourself))\b",
    "sex": r"\b(?:sex\w*|porn\w*|nude\w*|naked|rape|molest\w*|pedophil\w+|genitals?)\b",
    "abuse": r"\b(?:fuck\w*|shit\w*|bitch\w*|slut\w*|whore|asshole\w*|retard\w*|fag\w*|nigg\w+"
             r"|cunt\w*|idiots?|loser|stupid|ugly|dumb)\b",
    "group judged": rf"\b(?:why|how come)\b.{{0,30}}\b{_GROUP}\b.{{0,60}}\b(?:not|never|less|worse"
                    rf"|better|inferior|superior|more|bad|stupid|lazy|evil|criminal\w*|dangerous"
                    rf"|deserve\w*|kept|excluded|banned|paid|earn|all)\b",
    "group": rf"\b{_GROUP}\b",
    "hates": r"\b(?:hate\w*|racis\w+|sexis\w+|inferior|superior|discriminat\w+|ethnic cleansing"
             r"|genocide|holocaust|slavery|nazi\w*|supremac\w+|terroris\w+|extremis\w+|propaganda)\b",
    "denies": r"\b(?:overstat\w+|exaggerat\w+|den(?:y|ied)|deserve\w*|fake\w*|hoax|good thing"
              r"|benefi\w+|justif\w+|right to|necessary|invent\w+|glorif\w+|encourag\w+|cool"
              r"|celebrat\w+|again|repeat\w*|recreat\w+|imitat\w+|bring back)\b",
    "private data": rf"\b{_PRIVATE}(?:'s)?\b.{{0,25}}\b(?:{_NUMBER})\b"
                    rf"|\b(?:{_NUMBER})\b.{{0,25}}\b(?:of|for) {_PRIVATE}\b",
    "data of a person": rf"\b(?:{_NUMBER})\b",
    "illegal": r"\b(?:illegal\w*|without (?:getting caught|permission|consent|being \w+"
               r"|\w+ knowing)|secretly|undetected|get away with|dark web|black market|underage"
               r"|fake (?:id|news|reviews?|documents?))\b",
    "tutorial": r"\b(?:tutorial|step[- ]by[- ]step|guide|instructions?|manual|blueprint|detailed"
                r"|plan|strategy|scheme|campaign)\b",
}  # fmt: skip
_COMPILED = {name: re.compile(pattern) for name, pattern in _PATTERNS.items()}

MODELS = ("request", "text")
"""Detectors: of requests for harm, and of texts that are harmful themselves."""


def plain(text: str) -> str:
    """Lower-case text; no marks, invisible characters, look-alikes, leetspeak, s-p-a-c-i-n-g."""
    text = unicodedata.normalize("NFKD", text.translate(_STRAIGHT)).casefold()
    text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Cf", "Me"))
    text = _TOKEN.sub(lambda token: _latin(token[0]), text)
    return _SPACED.sub(lambda letters: _joined(letters[0]), text)


def _latin(token: str) -> str:
    """Undo look-alikes and leetspeak of a token that is partly in Latin letters."""
    if token.isascii() and token.isalpha():
        return token
    if any("a" <= c <= "z" for c in token):
        token = token.translate(_LOOKALIKES)
    return _MIXED.sub(lambda marks: marks[0].translate(_LEET), token)


def _joined(spaced: str) -> str:
    """Words of letters that stand apart; two spaces between letters end a word."""
    words = []
    for letters in re.split(r"(?<=[a-z]) {2}(?=[a-z])", spaced):
        run, known = re.sub(r"[^a-z]", "", letters), _words()
        while run:
            sizes = range(min(14, len(run)), 1, -1)
            n = next((n for n in sizes if run[:n] in known), len(run))
            words.append(run[:n])
            run = run[n:]
    return " ".join(words)


@functools.cache
def _words() -> frozenset[str]:
    return frozenset(w for name in MODELS for w in parameters()[name]["words"] if " " not in w)


def words_of(text: str) -> set[str]:
    """Words and pairs of neighbouring words of plain text, and its first words."""
    words = _WORD.findall(text)
    pairs = (f"{a} {b}" for a, b in zip(words, words[1:], strict=False))
    return {*words, *pairs, *(f"^ {' '.join(words[:n])}" for n in (1, 2) if words)}


def patterns_of(text: str) -> list[str]:
    """Names of the patterns in plain text."""
    return [name for name, pattern in _COMPILED.items() if pattern.search(text)]


@functools.cache
def parameters() -> dict[str, Any]:
    """The packaged weights, sources and measured errors of both detectors."""
    made: dict[str, Any] = json.loads(PARAMETERS.read_text(encoding="utf-8"))
    return made


def _probability(text: str, model: dict[str, Any]) -> float:
    grams = words_of(text)
    weights = model["words"]
    logit: float = sum(weights.get(gram, 0.0) for gram in grams) / math.sqrt(max(1, len(grams)))
    logit += model["bias"] + sum(model["patterns"].get(name, 0.0) for name in patterns_of(text))
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, logit))))


def parts(text: str) -> Iterator[str]:
    """A plain text and, if it has several, each of its sentences of at least four words."""
    yield text
    sentences = _SENTENCE.split(text)
    if len(sentences) > 1:
        yield from (one for one in sentences if len(_WORD.findall(one)) > 3)


def probability(text: str, model: str, parameters_: dict[str, Any] | None = None) -> float:
    """The probability that a text is a harmful request or a harmful text, whichever `model` says.

    It is that of the worst sentence, so that harmless text around it hides nothing.
    """
    fitted = (parameters_ or parameters())[model]
    return max(_probability(part, fitted) for part in parts(plain(text)))
