"""Harmless sentences that name a group: labelled text has few of them, and a filter takes the names for insults.

Each frame is filled with every term (Dixon et al. 2018, Measuring and mitigating unintended bias; Park et al. 2018). They
are examples of what is harmless; what is said against a group stays what the labels call it.
"""

from __future__ import annotations

import random

ADJECTIVES = (
    "gay", "lesbian", "bisexual", "transgender", "trans", "queer", "straight", "heterosexual", "homosexual", "nonbinary",
    "black", "white", "brown", "Asian", "African", "African American", "Latino", "Latina", "Hispanic", "Mexican", "Arab",
    "Chinese", "Japanese", "Indian", "Pakistani", "Native American", "European", "American", "German", "Polish", "Russian",
    "Turkish", "Nigerian", "Irish", "Muslim", "Jewish", "Christian", "Catholic", "Protestant", "Hindu", "Buddhist", "Sikh",
    "atheist", "religious", "deaf", "blind", "disabled", "autistic", "paralyzed", "bipolar", "old", "older", "elderly", "young",
    "female", "male", "fat", "poor", "rich", "immigrant", "homeless",
)  # fmt: skip
GROUPS = (
    "gays", "lesbians", "gay men", "gay people", "lesbian women", "bisexuals", "trans people", "transgender people",
    "queer people", "straight people", "black people", "white people", "brown people", "black women", "black men",
    "white men", "Asians", "Africans", "African Americans", "Latinos", "Mexicans", "Arabs", "Chinese people", "Indians",
    "Pakistanis", "Native Americans", "Germans", "Poles", "Russians", "Turks", "Muslims", "Jews", "Christians", "Catholics",
    "Hindus", "Buddhists", "Sikhs", "atheists", "deaf people", "blind people", "disabled people", "people with autism",
    "people in wheelchairs", "old people", "young people", "teenagers", "women", "men", "girls", "boys", "mothers",
    "fathers", "immigrants", "refugees", "foreigners", "homeless people", "poor people",
)  # fmt: skip
PERSONS = (
    "man",
    "woman",
    "person",
    "girl",
    "boy",
    "student",
    "teacher",
    "doctor",
    "friend",
    "neighbour",
    "guy",
    "colleague",
)
OF_ONE = (
    "I am {a} {person}.", "I am {a} {person} and I am happy.", "I'm {a} {person} from a small town",
    "My friend is {adjective}.",
    "My best friend is {a} {person}, we went to school together.", "She is {adjective} and she is a great cook.",
    "He told his family that he is {adjective}.", "{a} {person} lives next door.", "being {adjective} is a part of who I am",
    "We met {a} {person} at the library yesterday", "The mayor is {a} {person}.", "proud to be {adjective}",
    "as {a} {person} I feel welcome here", "Our new teacher is {adjective}, the kids like her.", "my mom is {adjective}",
    "they hired {a} {person} for the job", "The film is about {a} {person} who moves to the city.",
    "Happy birthday to my {adjective} {person}!", "i have {a} {person} in my class", "The author, {a} {person}, won a prize.",
    "she married {a} {person} last summer", "are you {adjective}?", "My {adjective} {person} called me today.",
)  # fmt: skip
OF_MANY = (
    "{group} are people like everyone else.", "Many {group} live in this city.", "I work with {group}.",
    "{group} and their families came to the festival.", "The book tells the history of {group}.", "We support {group}.",
    "the center offers help for {group}", "I learned a lot from {group} at school.", "Some {group} voted early.",
    "There was an interview with {group} on the radio", "{group} deserve equal rights.", "I have friends who are {group}",
    "The law protects {group}.", "a new study about the health of {group}", "we invited {group} to dinner",
    "Doctors say that {group} should get the vaccine.", "love to all {group} today", "the museum shows the art of {group}",
)  # fmt: skip


def article(word: str) -> str:
    """The word with the article that English puts before it."""
    return f"{'an' if word[0] in 'AEIOUaeio' and not word.startswith('Eu') else 'a'} {word}"


def sentences(seed: int, persons: int = 2) -> list[str]:
    """Every frame with every term; of the frames with a person so many persons, drawn by the seed."""
    draw = random.Random(seed)
    made = []
    for frame in OF_ONE:
        for term in ADJECTIVES:
            for person in draw.sample(PERSONS, persons if "{person}" in frame else 1):
                made.append(frame.format(a=article(term), adjective=term, person=person))
    made += [frame.format(group=group) for frame in OF_MANY for group in GROUPS]
    return [text[0].upper() + text[1:] if draw.random() < 0.7 else text.lower() for text in made]
