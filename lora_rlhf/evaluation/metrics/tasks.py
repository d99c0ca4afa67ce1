# SPDX-License-Identifier: Apache-2.0
"""Task success of sampled answers: IFEval, right answers, ROUGE, BLEU, chrF, and valid JSON."""

from __future__ import annotations

import functools
import logging
import re
import string
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_rlhf.data import answer_format
from lora_rlhf.errors import DataError
from lora_rlhf.evaluation.prompt_sets import Row
from lora_rlhf.runtime import optional_packages

from .metric import Metric

# ------------------------------------------------------------------------------ IFEval


@functools.cache
def _checkers() -> dict[str, Any]:
    """Return lm-eval's class for every instruction, which give the same verdict every time."""
    nltk = optional_packages.load("nltk", "IFEval", "eval")
    optional_packages.load("langdetect", "IFEval", "eval").DetectorFactory.seed = 0
    logging.getLogger("lm_eval.tasks.ifeval.instructions").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        try:
            nltk.data.find("tokenizers/punkt_tab/english/")
        except LookupError:  # lm-eval would download it; this package has the same tables
            tables = optional_packages.load("punkt.data.english", "IFEval", "eval")
            english = Path(folder, "tokenizers", "punkt_tab", "english")
            english.mkdir(parents=True)
            for name, lines in (
                ("abbrev_types.txt", tables.ABBREV_TYPES),
                ("sent_starters.txt", tables.SENT_STARTERS),
                ("collocations.tab", map("\t".join, tables.COLLOCATIONS)),
                ("ortho_context.tab", (f"{w}\t{n}" for w, n in tables.ORTHO_CONTEXT.items())),
            ):
                (english / name).write_text("\n".join(lines), encoding="utf-8")
            nltk.data.path.append(folder)
        registry = optional_packages.load(
            "lm_eval.tasks.ifeval.instructions_registry", "IFEval", "eval"
        )
        # Both tokenizers keep their tables in memory from now on.
        registry.instructions.instructions_util.count_sentences("One.")
        nltk.word_tokenize("One.")
        if folder in nltk.data.path:
            nltk.data.path.remove(folder)
    checkers: dict[str, Any] = registry.INSTRUCTION_DICT
    return checkers


def _follows(row: Row, texts: list[str]) -> float:
    """Return 1 if each instruction is followed by at least one of these texts, else 0."""
    reference = row.reference
    for name, kwargs in zip(reference["instruction_id_list"], reference["kwargs"], strict=True):
        checker = _checkers()[name](name)
        if letter := kwargs.get("letter"):
            # lm-eval would draw another letter at random for one that is not from a to z.
            checker.build_description(**kwargs | {"letter": "a"})
            checker._letter = letter.lower()
        else:
            checker.build_description(**kwargs)
        if not any(text.strip() and checker.check_following(text) for text in texts):
            return 0.0
    return 1.0


def ifeval_strict(row: Row, answer: str) -> float | None:
    """Return 1 if the answer follows all its instructions."""
    return _follows(row, [answer])


def ifeval_loose(row: Row, answer: str) -> float | None:
    """Return 1 if each instruction is followed, if need be without first line, last line or *."""
    lines = answer.split("\n")
    cut = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return _follows(row, cut + [text.replace("*", "") for text in cut])


# ----------------------------------------------------------------- right answers, texts


def normalised(text: str) -> list[str]:
    """Return the words of SQuAD's normalisation: no case, punctuation or articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(row: Row, answer: str) -> float | None:
    """Return 1 if the normalised answer equals a right one."""
    return float(any(normalised(answer) == normalised(one) for one in row.reference["answers"]))


def f1(row: Row, answer: str) -> float | None:
    """Return the F1 of the answer's words and those of the nearest right answer."""
    return max(_overlap(normalised(answer), normalised(one)) for one in row.reference["answers"])


def _overlap(words: list[str], right: list[str]) -> float:
    if not words or not right:  # as in SQuAD 2, where a question may have no answer
        return float(words == right)
    shared = (Counter(words) & Counter(right)).total()
    return 2 * shared / (len(words) + len(right))


def quac_f1(row: Row, answer: str) -> float | None:
    """Return QuAC's F1: the best over the references, each left out once, on average."""
    each = [_overlap(normalised(answer), normalised(one)) for one in row.reference["answers"]]
    if len(each) == 1:
        return each[0]
    return sum(max(each[:i] + each[i + 1 :]) for i in range(len(each))) / len(each)


@functools.cache
def _rouge() -> Any:
    scorer = optional_packages.load("rouge_score.rouge_scorer", "rouge_l", "eval")
    return scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(row: Row, answer: str) -> float | None:
    """Return the F-measure of ROUGE-L against the nearest reference."""
    return float(_rouge().score_multi(row.reference["answers"], answer)["rougeL"].fmeasure)


def _sacrebleu(function: str) -> Callable[[Row, str], float | None]:
    def score(row: Row, answer: str) -> float | None:
        sacrebleu = optional_packages.load("sacrebleu", function, "eval")
        return float(getattr(sacrebleu, function)(answer, row.reference["answers"]).score)

    return score


# -------------------------------------------------------------------------------- JSON

_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL | re.IGNORECASE)


def json_valid(row: Row, answer: str) -> float | None:
    """Return 1 if the answer is JSON that the schema allows; a Markdown fence around it is cut off.

    Raises:
        DataError: The schema itself is invalid.
    """
    fenced = _FENCED.fullmatch(answer)
    try:
        checks = {"json_schema": row.reference["schema"]}
        return float(not answer_format.problems(fenced[1] if fenced else answer, checks))
    except ValueError as error:
        raise DataError(
            f"the schema of the prompt {row.id!r} is invalid: {error}",
            expected="a JSON schema without references to other files",
            remedy="correct `reference: {schema: ...}` of this row",
        ) from error


_NEAREST = "the reference that is nearest (0 to 1), mean over prompts"
_IFEVAL: dict[str, Any] = {
    "needs": ("instruction_id_list", "kwargs"),
    "better": "higher",
    "share": True,
}
_RIGHT: dict[str, Any] = {"needs": ("answers",), "better": "higher"}

METRICS = (
    Metric(
        "ifeval_strict",
        "share of prompts whose answer follows all its checkable instructions",
        score=ifeval_strict,
        source="Zhou et al. 2023 (IFEval), prompt level, strict; lm-eval's checkers",
        **_IFEVAL,
    ),
    Metric(
        "ifeval_loose",
        "share of prompts whose answer follows all its checkable instructions, first line, last "
        "line and asterisks left out where that helps",
        score=ifeval_loose,
        source="Zhou et al. 2023 (IFEval), prompt level, loose; lm-eval's checkers",
        **_IFEVAL,
    ),
    Metric(
        "exact_match",
        "share of answers that equal a right answer, apart from case, punctuation and articles",
        share=True,
        score=exact_match,
        source="Rajpurkar et al. 2016 (SQuAD), exact match",
        **_RIGHT,
    ),
    Metric(
        "f1",
        f"F1 of the answer's words and those of {_NEAREST}",
        share=False,
        score=f1,
        source="Rajpurkar et al. 2016 (SQuAD), F1; no answer as in SQuAD 2",
        **_RIGHT,
    ),
    Metric(
        "quac_f1",
        "F1 of the answer's words and those of the nearest reference (0 to 1), with each of "
        "several references left out once; mean over questions",
        share=False,
        score=quac_f1,
        source="Choi et al. 2018 (QuAC), F1, without the filter by people's agreement",
        **_RIGHT,
    ),
    Metric(
        "rouge_l",
        f"F-measure of the longest common subsequence of stemmed words with {_NEAREST}",
        share=False,
        score=rouge_l,
        source="Lin 2004 (ROUGE-L); rouge-score",
        **_RIGHT,
    ),
    Metric(
        "bleu",
        "sentence BLEU against all references (0 to 100), mean over prompts; not corpus BLEU",
        share=False,
        score=_sacrebleu("sentence_bleu"),
        source="Papineni et al. 2002 (BLEU); sacrebleu's sentence_bleu",
        **_RIGHT,
    ),
    Metric(
        "chrf",
        "F-score of character n-grams against the nearest reference (0 to 100), mean over prompts",
        share=False,
        score=_sacrebleu("sentence_chrf"),
        source="Popović 2015 (chrF2); sacrebleu's sentence_chrf",
        **_RIGHT,
    ),
    Metric(
        "json_valid",
        "share of answers that are JSON as the prompt's schema demands, with or without a fence",
        better="higher",
        share=True,
        score=json_valid,
        needs=("schema",),
        source="JSON Schema; jsonschema",
    ),
)
