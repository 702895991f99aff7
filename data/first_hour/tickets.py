"""Generate support tickets for six queues, with overlapping texts and some wrong labels.

Every ticket combines parts of its queue with parts that all queues share, so that some tickets
could be in either of two queues. With probability `NOISE` a ticket's label is a random queue, in
every file alike.
"""

import random
from dataclasses import dataclass

NOISE = 0.08

_SUBJECTS = {
    "Billing": [
        "I was charged twice for {product}",
        "the invoice for {month} shows the wrong amount",
        "my card was declined when I renewed {product}",
        "please refund the payment for {product}",
        "the VAT number on the {month} invoice is missing",
        "why did the price of {product} go up",
    ],
    "Login": [
        "I cannot sign in to {product}",
        "the password reset mail for {product} never arrives",
        "my account is locked after {count} attempts",
        "the second factor code is not accepted",
        "single sign-on sends me back to the start page",
        "{product} logs me out every {count} minutes",
    ],
    "Bug": [
        "{product} crashes when I open {thing}",
        "the {thing} shows an empty page since {month}",
        "saving {thing} ends with error {count}",
        "the search in {product} finds nothing",
        "{thing} is cut off at the right edge",
        "{product} freezes for {count} seconds on start",
    ],
    "Shipping": [
        "my parcel with {product} has not arrived",
        "the tracking number does not work",
        "the box of {product} was damaged",
        "you sent {product} to my old address",
        "delivery was promised in {month}",
        "{count} pieces are missing from the delivery",
    ],
    "Feature request": [
        "please add an export of {thing} to {product}",
        "it would help to sort {thing} by date",
        "can {product} remind me of {thing}",
        "a dark theme for {product} would be great",
        "we need more than {count} users in {product}",
        "could {thing} be shared with a link",
    ],
    "Cancellation": [
        "I want to cancel {product} at the end of {month}",
        "please close my account",
        "we do not need {product} any more",
        "how do I stop the renewal of {product}",
        "delete all my data and {thing}",
        "we move to another supplier in {month}",
    ],
}
#: Sentences that occur in tickets of every queue; some resemble those of another queue.
_SHARED = [
    "I have been a customer for {count} years.",
    "The last invoice was paid on time.",
    "I tried it on two computers.",
    "My colleague has the same trouble with {thing}.",
    "If this is not settled I will cancel.",
    "I cannot find it in my account.",
    "The order came in {month}.",
    "Nobody answered my last mail.",
    "It worked in {month}.",
    "I would like my money back.",
    "Please call me, the login page is of no help.",
    "Thanks in advance.",
]
_VAGUE = ["It is about {product}", "Question about {thing}", "Still not solved: {product}", "{product}, again"]
_PRODUCTS = ["Notes Pro", "the mail plan", "CloudBox", "the label printer", "Team Calendar", "the scanner"]
_THINGS = ["the report", "attachments", "the calendar", "invoices", "contacts", "the dashboard"]
_MONTHS = ["January", "March", "May", "July", "September", "November"]

QUEUES = tuple(_SUBJECTS)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A ticket's text and its queue, which is a random one with probability `NOISE`."""

    text: str
    queue: str


def make_tickets(count: int, seed: int) -> list[Ticket]:
    """Generate `count` tickets with distinct texts."""
    rng = random.Random(seed)
    found: dict[str, Ticket] = {}
    while len(found) < count:
        queue = rng.choice(QUEUES)
        text = _text(rng, queue)
        filed = rng.choice(QUEUES) if rng.random() < NOISE else queue
        found.setdefault(text, Ticket(text, filed))
    return list(found.values())


def _text(rng: random.Random, queue: str) -> str:
    opening = rng.choice(_VAGUE) if rng.random() < 0.15 else rng.choice(_SUBJECTS[queue])
    parts = [opening, *rng.sample(_SHARED, rng.randint(1, 3))]
    if rng.random() < 0.3:  # a second topic, from any queue
        parts.insert(1, "Also " + rng.choice(_SUBJECTS[rng.choice(QUEUES)]))
    filled = [
        part.format(
            product=rng.choice(_PRODUCTS),
            thing=rng.choice(_THINGS),
            month=rng.choice(_MONTHS),
            count=rng.randint(2, 12),
        )
        for part in parts
    ]
    return " ".join(_mistyped(rng, part.rstrip(".") + ".") for part in filled)


def _mistyped(rng: random.Random, sentence: str) -> str:
    """Add occasional typing errors, and capitalise most sentences."""
    if rng.random() < 0.2 and len(sentence) > 8:
        at = rng.randrange(1, len(sentence) - 2)
        sentence = sentence[:at] + sentence[at + 1] + sentence[at] + sentence[at + 2 :]
    return sentence[0].upper() + sentence[1:] if rng.random() < 0.8 else sentence
