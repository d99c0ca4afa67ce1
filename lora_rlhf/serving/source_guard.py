# SPDX-License-Identifier: Apache-2.0
"""Sources are data: instructions in them are left out of the prompt, and reported.

Ordinary documents seldom address a model. A sentence counts as an instruction if it speaks to a
model about its instructions, its answer or its role. A text can be written to pass this check; the
answer is checked against the passages afterwards.
"""

from __future__ import annotations

import re
import unicodedata

_ORDERS = (
    r"(?:instruction|prompt|order|direction|rule|command|guideline|context|message|question|text"
    r"|passage|source|document|content|conversation|training|task)s?"
)
_MODEL = r"(?:an? |the |any |all |every )?(?:ai|llm|language model|assistant|chat ?bot|bot)s?\b"
_SPEAK = r"(?:say|answer|reply|respond|output|print|repeat|reveal)"
_SAY = rf"(?:{_SPEAK}|write|return|state|show|tell)"
_ANSWER = r"(?:answer|response|reply|output|summary|translation)"
_MUST = r"(?:must|should|shall|has to|have to|need to|is to|are to|required to|please|kindly)"
_START = r"(?:^\W*(?:\w+ )?|[:;,]\s*|\b(?:and|then|instead) )"
_PATTERNS = (
    r"\b(?:ignore|disregard|forget|override|bypass|skip|neglect)\b.{0,40}?\b(?:above|previous"
    r"|prior|earlier|preceding|foregoing|before|all|any|your|these|those|other|system)\b"
    rf"(?:.{{0,40}}?\b{_ORDERS}\b|\W*$|.{{0,20}}?\b(?:and|then|instead)\b)",
    r"^\W*(?:please |now |then )?(?:ignore|disregard|forget) (?:the user|the question|everything"
    r"|what you|about the|whatever)",
    rf"\b(?:new|updated?|real|actual|true|hidden|secret|special|important) {_ORDERS}\b\W*:",
    r"\bnew (?:instruction|order|command|task)s?\b.{0,30}(?:\bfor you\b|\byou\b|[:.]\s*$)",
    r"\byour (?:new |only |real |next |first )?(?:task|role|mission|instruction)s? "
    r"(?:is|are|has|have)\b",
    r"\b(?:system|developer|hidden|initial) (?:prompt|message|instruction)s?\b",
    rf"\b(?:note|message|attention|instructions?|memo|warning)s? (?:to|for) {_MODEL}",
    rf"\b(?:if|when|as) (?:you(?:'re| are) )?{_MODEL}.{{0,60}}\b(?:{_MUST}|{_SAY})\b",
    rf"\b{_MODEL}.{{0,30}}\b{_MUST} (?:\w+ )?(?:{_SAY}|recommend|mention|include|add|use|follow)\b",
    rf"^\W*{_MODEL}\s*[,:!]|^\W*(?:de[a]r|hey|hello|attention) {_MODEL}",
    r"\byou (?:are|will be|must be|act|must act) (?:now |from now on )?(?:an? |as |in )?"
    r"(?:\w+ ){0,2}(?:ai|assistant|language model|chat ?bot|bot|developer mode|unrestricted"
    r"|jailbroken|pirate)\b",
    r"\byou are now\b.{0,40}\b(?:who|that|which) (?:answer|say|repl|respond|speak)",
    r"\bfrom now on\b.{0,30}\b(?:answer|respond|reply|say|speak)\b",
    rf"\b(?:you|the {_ANSWER}) {_MUST}(?: \w+)? {_SPEAK}\b(?! for yourself)",
    rf"\byou (?:will|are going to|only) {_SPEAK}\b (?:in|with|only|as)\b",
    rf"(?:^\W*|\b(?:and|then|please|instead|just|simply|only|always|now|must) ){_SAY}\b\s*"
    r"(?:only\b|just\b|exactly\b|always\b|instead\b|with\b|the (?:word|phrase|sentence|token|text"
    r"|following)\b|in (?:all )?(?:caps|capitals)\b|[\"'“‘`:]|(?-i:[A-Z]{3,}))",
    rf"{_START}(?:respond|reply|answer|speak|talk) (?:only )?(?:in|like|as) (?:if )?(?:an? )?\w+",
    rf"{_START}{_SPEAK} with\b",
    rf"^\W*{_SAY} (?!me\b|us\b|him\b|her\b)(?:that |all |every |any |to )?(?:\w+ ){{0,4}}"
    r"(?:question|user|prompt|password|secret|reader)s?\b",
    rf"^\W*(?:please )?(?:do not|don't|never) (?:\w+ )?(?:{_SAY}|mention|use|cite|follow)\b"
    r".{0,60}?\b(?:question|user|passage|source|instruction|above|answer)",
    rf"\b(?:the|your) (?:only |correct |right )?{_ANSWER} "
    r"(?:to (?:every|any|all|the) \w+ )?(?:is always|must be|should be|has to be|will be|shall be)"
    r"\b(?! no\b| yes\b)",
    r"\b(?:begin|start|end|finish|close|open|preface|conclude|append|add|include|insert|put|mention)"
    rf"\b.{{0,60}}\b(?:your|every|each|all|any) {_ANSWER}s?\b",
    r"\b(?:all|any|every|each) questions?\b.{0,40}\bmust be\b|\b(?:whatever|regardless of|no matter"
    r" what) (?:the |a )?(?:question|user|prompt)\b",
    r"\b(?:when|while|before|after) (?:you )?(?:summari[sz](?:e|ing)|answer(?:ing)?|respond(?:ing)?"
    r"|read(?:ing)?|process(?:ing)?|translat(?:e|ing))\b.{0,50}"
    rf"(?:,|\byou\b|\bplease\b)\s*(?:{_MUST} )?(?:{_SAY}|mention|add|include|claim|recommend)\b",
    r"\bthe user (?:has |now |also |really |actually )*(?:asked|asks|wants|requested|requests|told)"
    r" (?:you|the ai|for you)\b",
    r"^\W*(?:translate|summari[sz]e|rewrite|repeat|complete|continue) (?:the|this|these|all"
    r"|everything) (?:following|above|text|sentence|document|passage|prompt)\b",
    r"^\W*(?:write|tell|compose|sing|generate) (?:me |us )?(?:an? )?(?:\w+ )?(?:poem|haiku|joke"
    r"|song|essay|limerick|story)\b",
    r"\byou are (?:now (?:in|operating|acting|dan\b|an? helpful)"
    r"|no longer (?:an? )?(?:ai|assistant|\w+ model))"
    r"|\b(?:supersede|override|replace|revoke)[sd]? (?:all |any )?(?:prior|previous|earlier) "
    r"|\byour (?:prompt|(?:original|initial|previous|prior) (?:instruction|direction|prompt)s?)\b",
    r"\b(?:before|above) this (?:message|line|text|point)\b"
    r"|\b(?:beginning|start) of (?:this|the|our) (?:conversation|chat|prompt)\b"
    r"|^\W*(?:do not|don't) say\b",
    r"\b(?:new|next|real) (?:question|query|request|conversation)\s*:"
    r"|^\W*end of (?:the )?(?:document|text|passage|context|source)s?\b",
    r"^\W*(?:system|assistant|user|human|developer"
    r"|(?:admin(?:istrator)?|root|override|sudo)\b[\])]?(?: \w+)?)\s*:",
    r"<\|?/?(?:im_start|im_end|system|assistant|user|inst|endoftext|passage)\b|\[/?INST\]|<<SYS>>",
    r"^#{2,} ?(?:instruction|system|response|answer|human|assistant)s?\b",
    r"\b(?:ignorier\w*|vergiss|ignore[rz]|oublie[rz]?|ignor[ae]\w*|olvida\w*|dimentica\w*)\b.{0,40}"
    r"\b(?:anweisung\w*|vorherig\w*|instrucc\w*|istruzion\w*|anterior\w*|précédent\w*|precedent\w*)",
)
_INSTRUCTS = re.compile("|".join(f"(?:{pattern})" for pattern in _PATTERNS), re.IGNORECASE)
_LEFT_OUT = "[...]"


def _seen(text: str) -> str:
    """The text as a reader sees it: no invisible characters, usual forms of letters, one space."""
    plain = unicodedata.normalize("NFKC", text)
    plain = "".join(c for c in plain if unicodedata.category(c) != "Cf")
    return " ".join(plain.translate(_ALIKE).split())


def _joined(text: str) -> str:
    """The text with words rejoined whose letters hyphens, dots or spaces had separated."""
    text = re.sub(r"(?<=\w)[-._*·](?=\w)", "", text)
    return re.sub(r"\b(?:\w ){3,}\w\b", lambda match: match[0].replace(" ", ""), text)


_ALIKE = str.maketrans("аеорсхуіѕԁІАЕОРСХТМНВК’", "aeopcxyisdIAEOPCXTMHBK'")
_SENTENCE = re.compile(r"\S.*?(?:[.!?…:]+[\"'”’)\]]*(?=\s|$)|(?=\n)|$)", re.MULTILINE)


def instructs(sentence: str) -> bool:
    """Tell whether a sentence speaks to a model about its instructions, answer or role."""
    seen = _seen(sentence)[:2_000]
    return any(_INSTRUCTS.search(text) for text in {seen, _joined(seen)})


def cleaned(text: str) -> tuple[str, list[str]]:
    """Return a passage without the sentences that instruct, and these sentences.

    A sentence that ends in a colon takes the next one with it.
    """
    left_out: list[str] = []
    parts: list[str] = []
    end, open_ = 0, False
    for piece in _SENTENCE.finditer(text):
        if instructs(piece[0]) or open_:
            empty = not re.search(r"\w", re.sub(r"<[^>]*>", "", piece[0]))
            open_ = open_ and empty or piece[0].rstrip("\"'”’)]").endswith(":")
            left_out.append(piece[0])
            parts.append(text[end : piece.start()] + _LEFT_OUT)
        else:
            parts.append(text[end : piece.end()])
        end = piece.end()
    text = "".join([*parts, text[end:]])
    # Words of an order may be split between sentences or lines.
    if not left_out and instructs(text):
        return _LEFT_OUT, [text]
    return text, left_out


def quoted(text: str) -> str:
    """Escape what could close or open a passage of the prompt."""
    return re.sub(r"<(?=\s*/?\s*passage)", "‹", text, flags=re.IGNORECASE)
