# SPDX-License-Identifier: Apache-2.0
"""Measure how much personal data `data.personal_data` finds, on a labelled set that this generates.

    python scripts/measure_personal_data.py --page docs/hygiene.md

Recall: share of the labelled places that are covered completely, whatever their kind. Precision:
share of the places found that touch a labelled one. Half of the names are in our lists.
"""

from __future__ import annotations

import argparse
import random
import re
import string
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lora_rlhf.data import identity_terms
from lora_rlhf.data.personal_data import KINDS, Finder, Span

UNLISTED = (
    "Oluwaseun Thandiwe Siobhan Eoghan Xochitl Nikolaos Ozlem Tuan Bjarne Aroha Sipho Zsofia"
).split()
UNLISTED_FAMILY = (
    "Okonkwo Papadopoulos Yilmaz Brzezinski Haapala Ngata Dlamini Szabo Iyer Quispe".split()
)
WITH_DATA = (
    "My name is {PERSON} and I need help with a letter to my landlord.",
    "Dear {PERSON}, thank you for your order.",
    "Write a birthday poem for {PERSON}, who turns forty next week.",
    "{PERSON} told me that the meeting was moved to Friday.",
    "Can you ask {PERSON} to send the report to {EMAIL_ADDRESS}?",
    "Please call me back at {PHONE_NUMBER} after 5 pm.",
    "Contact: {PERSON}, {PHONE_NUMBER}, {EMAIL_ADDRESS}",
    "My card number is {CREDIT_CARD} and it expires in 2027.",
    "Transfer the money to {IBAN_CODE} by Monday.",
    "The server at {IP_ADDRESS} does not answer since yesterday.",
    "His social security number is {US_SSN}.",
    "Rewrite politely: {PERSON}, you still owe me 300 dollars!",
    "Summarise: the patient {PERSON} was admitted. Phone of relatives: {PHONE_NUMBER}.",
    "mail me: {EMAIL_ADDRESS} thanks!!",
    "text {PHONE_NUMBER} or write to {EMAIL_ADDRESS}",
)
WITHOUT = (
    "Write a short story about a dragon who lives in Paris and likes cheese.",
    "What is 3.14159 times 2024? Show all steps.",
    "The order 4471923 of 2024-03-17 costs $1,299.00 and ships on Monday.",
    "Explain the difference between Python 3.11.4 and Python 2.7.18.",
    "ISBN 978-3-16-148410-0 was printed in 1998 in New York by Penguin Books.",
    "Will you mark the essay in May? Grace and hope are its themes.",
    "Translate into German: The Eiffel Tower is 330 metres high.",
    "In {YEAR} the Roman Empire had about 60,000,000 inhabitants.",
    "Compare the Golden Gate Bridge with the Brooklyn Bridge in 100 words.",
    "Room 215, building 7, 12:30 to 14:45, every Tuesday until 31.12.2025.",
    "The function returns 0x7fff5fbff8a0 at line 1024 of main.c, commit 9f8e7d6.",
    "Score 21-14, 7-6 (7-4), 6-3; attendance 54,321.",
    "What did Albert Einstein publish in 1905, and what did Marie Curie publish?",
    "Derive the Taylor series of sin x, then the Laurent series of 1/z.",
    "Austin is the capital of Texas; Jordan borders Iraq; take the Victoria line.",
    "Is a Christian Dior bag cheaper at Marks and Spencer or at Johnson and Johnson?",
    "The values are 12 15 18 2024 10 10, then 3.14 2024-01-02 and 1990-1995 2001-2010.",
    "Product code 4155552671, part 030-2345678, version 1.2.3.4 of the firmware.",
    "Who wrote Harry Potter, and who wrote Tom Sawyer?",
    "Ask Jeeves was a search engine. Thomas Cook was a travel agency.",
    "Dear Santa, I want a bicycle. Sincerely, your biggest fan",
    "Name: Widget. Contact: Support. Customer Service is open from nine.",
    "List the planets: Mercury, Venus, Earth, Mars, Jupiter.",
)


def _digits(rng: random.Random, form: str) -> str:
    return "".join(rng.choice(string.digits) if c == "#" else c for c in form)


def _luhn(rng: random.Random) -> str:
    digits = [int(d) for d in "4" + _digits(rng, "#" * 14)]
    doubled = [d * 2 - 9 * (d > 4) if i % 2 == 0 else d for i, d in enumerate(digits)]
    text = "".join(map(str, [*digits, -sum(doubled) % 10]))
    return rng.choice((text, " ".join(text[i : i + 4] for i in range(0, 16, 4))))


def _iban(rng: random.Random) -> str:
    account = _digits(rng, "#" * 18)
    check = 98 - int(account + "131400") % 97  # DE00 as numbers
    return f"DE{check:02d}{account}"


def _value(kind: str, rng: random.Random, listed: bool) -> str:
    given = rng.choice(
        [name for gender in ("female", "male") for name in identity_terms.NAMES[gender]]
        if listed
        else UNLISTED
    )
    family = rng.choice(sorted(identity_terms.SURNAMES) if listed else UNLISTED_FAMILY)
    if kind == "PERSON":
        return rng.choice((given, f"{given} {family}"))
    if kind == "EMAIL_ADDRESS":
        user = rng.choice(
            (f"{given}.{family}", f"{given[0]}{family}", f"{given}{_digits(rng, '##')}")
        )
        host = rng.choice(("gmail.com", "example.org", "mail.uni-koeln.de", "acme.co.uk"))
        return f"{user.lower()}@{host}"
    if kind == "PHONE_NUMBER":
        # Numbers that are in use in the United States, the United Kingdom, Germany and India.
        forms = ("+1 212-7##-####", "(415) 6##-####", "212.7##.####", "+44 20 7946 0###",
                 "020 7946 0###", "+49 30 2######", "030/2######", "+91 98### #####")  # fmt: skip
        return _digits(rng, rng.choice(forms))
    if kind == "CREDIT_CARD":
        return _luhn(rng)
    if kind == "IBAN_CODE":
        return _iban(rng)
    if kind == "IP_ADDRESS":
        return ".".join(str(rng.randint(1, 254)) for _ in range(4))
    if kind == "US_SSN":
        return f"{rng.randint(100, 665)}-{rng.randint(10, 99)}-{rng.randint(1000, 9999)}"
    return str(rng.randint(100, 2000))  # a year


def labelled(n: int, seed: int = 0) -> Iterator[tuple[str, list[Span], bool]]:
    """Yield texts with their personal data, and if the names in them are in our lists."""
    rng = random.Random(seed)
    for number in range(n):
        listed = number % 2 == 0
        template = rng.choice(WITH_DATA + WITHOUT)
        text, spans = "", []
        for part in re.split(r"(\{\w+\})", template):
            if part[:1] == "{":
                kind, part = part[1:-1], _value(part[1:-1], rng, listed)
                if kind in KINDS:
                    spans.append(Span(len(text), len(text) + len(part), kind))
            text += part
        yield text, spans, listed


def measure(n: int, name_model: str, seed: int = 0) -> str:
    """Return the table of recall and precision by kind."""
    finder = Finder(name_model)
    given, hit, reported, right = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    seconds = -time.process_time()
    for text, spans, listed in labelled(n, seed):
        predicted = finder.spans(text)
        for one in spans:
            kind = one.kind if one.kind != "PERSON" else f"PERSON {'' if listed else 'un'}listed"
            given[kind] += 1
            covered = {i for p in predicted for i in range(p.start, p.end)}
            hit[kind] += covered.issuperset(range(one.start, one.end))
        for p in predicted:
            reported[p.kind] += 1
            right[p.kind] += any(p.start < one.end and one.start < p.end for one in spans)
    seconds += time.process_time()
    rows = [
        f"{n:,} generated texts, seed {seed}; names by {finder.names_by}; "
        f"{n / seconds:,.0f} texts a CPU second.\n",
        "| kind | labelled | recall | found | precision |\n|---|---|---|---|---|",
    ]
    for kind in sorted({*given, *reported}):
        recall = f"{hit[kind] / given[kind]:.3f}" if given[kind] else "–"
        precision = f"{right[kind] / reported[kind]:.3f}" if reported[kind] else "–"
        shown = f"{reported[kind]:,}" if kind in reported else "–"
        rows.append(f"| {kind} | {given[kind] or '–'} | {recall} | {shown} | {precision} |")
    rows.append(f"| all | {given.total():,} | {hit.total() / given.total():.3f} | "
                f"{reported.total():,} | {right.total() / reported.total():.3f} |")  # fmt: skip
    return "\n".join(rows)


def main() -> None:
    """Print the table, or write it between the markers of a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=4_000)
    parser.add_argument("--name-model", default="en_core_web_sm")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    table = measure(options.n, options.name_model)
    if options.page is None:
        print(table)
        return
    page = options.page.read_text(encoding="utf-8")
    start, end = "<!-- personal data -->", "<!-- end of personal data -->"
    head, _, rest = page.partition(start)
    options.page.write_text(
        f"{head}{start}\n\n{table}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
