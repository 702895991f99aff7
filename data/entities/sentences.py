"""Sentences with people, places and organisations, generated from patterns.

The kind of an entity follows from the words around it. Thirty words are names of two or three kinds
(Jordan, Lincoln, Amazon), so that a list of names is not enough. Half of the names of each kind
occur in the test split alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

FIRST = [
    "Amara",
    "Ingrid",
    "Tomas",
    "Leila",
    "Marcus",
    "Yuki",
    "Priya",
    "Oscar",
    "Helena",
    "Dmitri",
    "Nadia",
    "Felix",
    "Aisha",
    "Bruno",
    "Clara",
    "Samuel",
    "Mei",
    "Lukas",
    "Fatima",
    "Henrik",
    "Rosa",
    "Victor",
    "Elif",
    "Jonas",
    "Simone",
    "Pavel",
    "Greta",
    "Omar",
    "Lucia",
    "Stefan",
]
LAST = [
    "Novak",
    "Okafor",
    "Lindqvist",
    "Tanaka",
    "Moreau",
    "Silva",
    "Petrov",
    "Haddad",
    "Jansen",
    "Romano",
    "Kowalski",
    "Mbeki",
    "Larsen",
    "Fischer",
    "Gupta",
    "Herrera",
    "Dubois",
    "Costa",
    "Nilsson",
    "Weber",
    "Ali",
    "Svensson",
    "Marino",
    "Keller",
    "Sato",
    "Vargas",
    "Holm",
    "Bauer",
    "Rossi",
    "Lund",
]
PLACES = [
    "Lisbon",
    "Oslo",
    "Nairobi",
    "Kyoto",
    "Bogota",
    "Marseille",
    "Krakow",
    "Tunis",
    "Quebec",
    "Hanoi",
    "Seville",
    "Turin",
    "Accra",
    "Leipzig",
    "Osaka",
    "Porto",
    "Cape Town",
    "New Delhi",
    "San Juan",
    "Rio Negro",
    "Buenos Aires",
    "Salt Creek",
    "Fort Worth",
    "Los Alamos",
    "Port Said",
    "Great Falls",
    "Santa Rosa",
    "Novi Sad",
    "Le Havre",
    "Tel Aviv",
]
FIRMS = [
    "Corvant",
    "Helix Labs",
    "Brightwater Group",
    "Northgate Bank",
    "Solace Energy",
    "Tandem Air",
    "Quillon",
    "Meridian Foods",
    "Atlas Freight",
    "Lumen Systems",
    "Vantor",
    "Oakridge Press",
    "Silverline Rail",
    "Nimbus Media",
    "Castle Insurance",
    "Pioneer Steel",
    "Redwood Partners",
    "Orbis",
    "Kestrel Motors",
    "Ember Games",
    "United Grain",
    "Delta Union",
    "Harbour Trust",
    "First Mutual",
    "Cobalt Mining",
    "Summit College",
    "Riverside Clinic",
    "Polar Shipping",
    "Zenith Bikes",
    "Common Cause",
]
#: Names of more than one kind.
SHARED = {
    "PER": [
        "Jordan",
        "Lincoln",
        "Austin",
        "Sydney",
        "Florence",
        "Chelsea",
        "Madison",
        "Ford",
        "Wells",
        "Morgan",
        "Carter",
        "Dior",
        "Mercedes",
        "Chase",
        "Hudson",
    ],
    "LOC": [
        "Jordan",
        "Lincoln",
        "Austin",
        "Sydney",
        "Florence",
        "Chelsea",
        "Madison",
        "Phoenix",
        "Amazon",
        "Hudson",
        "Victoria",
        "Georgia",
        "Houston",
    ],
    "ORG": [
        "Lincoln",
        "Chelsea",
        "Ford",
        "Wells",
        "Morgan",
        "Dior",
        "Mercedes",
        "Chase",
        "Phoenix",
        "Amazon",
        "Carter",
        "Victoria",
    ],
}
PATTERNS = (
    "{PER} was born in {LOC} and moved to {LOC} at the age of nine .",
    "{PER} joined {ORG} as head of research last spring .",
    "{ORG} will close its office in {LOC} by the end of the year .",
    "Shares of {ORG} fell after {PER} resigned .",
    "The train from {LOC} to {LOC} was late again .",
    "{PER} said that {ORG} had not answered her letters .",
    "Rain is expected in {LOC} on Tuesday .",
    "A spokesman for {ORG} declined to comment .",
    '" We are proud of the team , " said {PER} , who has worked at {ORG} since 2009 .',
    "{ORG} bought {ORG} for two billion dollars .",
    "The mayor of {LOC} met {PER} on Friday .",
    "Few visitors to {LOC} know that {PER} once lived there .",
    "In {LOC} , {ORG} employs more than four hundred people .",
    "{PER} and {PER} were married in {LOC} .",
    "Critics of {ORG} say that it pays too little tax .",
    "The river near {LOC} burst its banks .",
    "He has never read a book by {PER} .",
    "The contract was signed by {PER} for {ORG} .",
    "Nobody was hurt , the police said .",
    "Flights over {LOC} were cancelled .",
    "{ORG} hired {PER} away from {ORG} .",
    "It was {PER} who first climbed the mountain above {LOC} .",
    "Customers complained that {ORG} had raised its prices .",
    "Prices rose by three per cent in March .",
    "{PER} teaches history at a school in {LOC} .",
    "The board of {ORG} will vote on the offer from {ORG} .",
    "She drove through {LOC} at night .",
    "Thousands marched in {LOC} against {ORG} .",
    "My neighbour , {PER} , grows tomatoes .",
    "The strike at {ORG} entered its third week .",
)


def sentences(
    seed: int, count: int, *, patterns: int = len(PATTERNS), new_names: bool = False
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the words and BIO tags of `count` sentences.

    Args:
        patterns: use only the first `patterns` patterns.
        new_names: use the half of the unambiguous names that other sentences do not use.
    """
    rng = random.Random(seed)
    half = slice(1, None, 2) if new_names else slice(0, None, 2)
    for _ in range(count):
        words: list[str] = []
        tags: list[str] = []
        for piece in rng.choice(PATTERNS[:patterns]).split():
            if not piece.startswith("{"):
                words.append(piece)
                tags.append("O")
                continue
            kind = piece.strip("{}")
            name = _name(rng, kind, half).split()
            words += name
            tags += [f"B-{kind}", *[f"I-{kind}"] * (len(name) - 1)]
        yield words, tags


def _name(rng: random.Random, kind: str, half: slice) -> str:
    if rng.random() < 0.35:
        return rng.choice(SHARED[kind])
    if kind == "PER":
        first, last = rng.choice(FIRST[half]), rng.choice(LAST[half])
        return rng.choice([first, last, f"{first} {last}"])
    return rng.choice((PLACES if kind == "LOC" else FIRMS)[half])
