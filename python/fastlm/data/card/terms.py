"""The words that a card counts and swaps: identity terms by group, and pairs that differ in who is spoken of.

English, single words, and only such as name people in nearly every use: black, white, straight, old and trans have too
many other meanings, and surnames and slurs are left out. The lists are small on purpose: a card prints them.
"""

from __future__ import annotations

GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "gender": {
        "women": ("she", "her", "hers", "herself", "woman", "women", "girl", "girls", "female", "females", "lady", "ladies",
                  "mother", "mothers", "daughter", "daughters", "wife", "wives", "sister", "sisters", "grandmother"),
        "men": ("he", "him", "his", "himself", "man", "men", "boy", "boys", "male", "males", "gentleman", "gentlemen",
                "father", "fathers", "son", "sons", "husband", "husbands", "brother", "brothers", "grandfather"),
        "transgender and non-binary people": ("transgender", "transsexual", "nonbinary", "genderqueer"),
    },
    "orientation": {
        "gay and bisexual people": ("gay", "gays", "lesbian", "lesbians", "bisexual", "bisexuals", "homosexual",
                                    "homosexuals", "queer", "lgbt", "lgbtq"),
        "heterosexual people": ("heterosexual", "heterosexuals"),
    },
    "religion": {
        "Christians": ("christian", "christians", "christianity", "catholic", "catholics", "protestant", "protestants"),
        "Muslims": ("muslim", "muslims", "islam", "islamic"),
        "Jews": ("jew", "jews", "jewish", "judaism"),
        "Hindus": ("hindu", "hindus", "hinduism"),
        "Buddhists": ("buddhist", "buddhists", "buddhism"),
        "atheists": ("atheist", "atheists", "atheism"),
    },
    "origin": {
        "Africans": ("african", "africans"),
        "Americans": ("american", "americans"),
        "Arabs": ("arab", "arabs", "arabic"),
        "Asians": ("asian", "asians", "chinese", "japanese", "korean", "koreans", "indian", "indians", "vietnamese"),
        "Europeans": ("european", "europeans", "british", "english", "french", "german", "germans", "italian", "italians",
                      "spanish", "polish", "russian", "russians"),
        "Latin Americans": ("hispanic", "hispanics", "latino", "latinos", "latina", "latinas", "mexican", "mexicans",
                            "brazilian", "brazilians"),
        "immigrants and refugees": ("immigrant", "immigrants", "migrant", "migrants", "refugee", "refugees"),
    },
    "age": {
        "the young": ("teenager", "teenagers", "child", "children", "youth", "youths", "kid", "kids"),
        "the old": ("elderly", "pensioner", "pensioners", "seniors", "retiree", "retirees"),
    },
    "disability": {
        "disabled people": ("disabled", "disability", "disabilities", "deaf", "autistic", "autism", "wheelchair",
                            "paralyzed", "paraplegic"),
    },
}  # fmt: skip

GROUP_OF = {term: group for groups in GROUPS.values() for group, terms in groups.items() for term in terms}

STOP = frozenset((
    "a", "about", "above", "after", "again", "against", "all", "also", "am", "an", "and", "any", "are", "as", "at",
    "be", "because", "been", "before", "being", "below", "between", "both", "but", "by", "can", "could", "did",
    "do", "does", "doing", "down", "during", "each", "else", "few", "for", "from", "further", "had", "has", "have",
    "having", "here", "how", "i", "if", "in", "into", "is", "it", "its", "itself", "just", "let", "may", "me",
    "might", "more", "most", "must", "my", "myself", "no", "nor", "not", "now", "of", "off", "on", "once", "one",
    "only", "or", "other", "our", "ours", "out", "over", "own", "s", "same", "shall", "should", "so", "some",
    "such", "t", "than", "that", "the", "their", "theirs", "them", "themselves", "then", "there", "these", "they",
    "this", "those", "through", "to", "too", "under", "until", "up", "upon", "us", "very", "was", "we", "were",
    "what", "when", "where", "which", "while", "who", "whom", "why", "will", "with", "would", "you", "your",
    "yours", "yourself", "d", "ll", "m", "re", "ve", "don",
))  # fmt: skip

# Words with exactly one counterpart. His, him, her and hers have none that a rule could find without reading the sentence.
MEN_TO_WOMEN = {
    "he": "she", "himself": "herself", "man": "woman", "men": "women", "boy": "girl", "boys": "girls", "father": "mother",
    "fathers": "mothers", "son": "daughter", "sons": "daughters", "husband": "wife", "husbands": "wives",
    "brother": "sister", "brothers": "sisters", "uncle": "aunt", "king": "queen", "gentleman": "lady",
    "gentlemen": "ladies", "grandfather": "grandmother",
}  # fmt: skip
WOMEN_TO_MEN = {woman: man for man, woman in MEN_TO_WOMEN.items()}
DOUBTFUL = frozenset({"him", "his", "her", "hers"})

OCCUPATIONS = (
    "an accountant", "an artist", "a baker", "a carpenter", "a cashier", "a cleaner", "a cook", "a doctor", "a driver",
    "an editor", "an engineer", "a farmer", "a guard", "a hairdresser", "a judge", "a lawyer", "a librarian", "a manager",
    "a mechanic", "a nurse", "a pilot", "a president", "a programmer", "a receptionist", "a scientist", "a secretary",
    "a soldier", "a teacher",
)  # fmt: skip
PRONOUN_FRAMES = ("{He} is {job}.", "{He} works as {job}.", "My friend is {job}, and {he} likes the work.")

# The commonest given names of the United States from 1924 to 2023 (Social Security Administration), rank by rank.
NAMES = (
    ("James", "Mary"), ("Michael", "Patricia"), ("Robert", "Jennifer"), ("John", "Linda"), ("David", "Elizabeth"),
    ("William", "Barbara"), ("Richard", "Susan"), ("Joseph", "Jessica"), ("Thomas", "Karen"), ("Christopher", "Sarah"),
)  # fmt: skip
# Names of white and of black Americans, from birth certificates (Bertrand and Mullainathan 2004, table 8).
ORIGINS = (
    ("Emily", "Aisha"), ("Anne", "Keisha"), ("Jill", "Tamika"), ("Allison", "Lakisha"), ("Laurie", "Tanisha"),
    ("Todd", "Rasheed"), ("Neil", "Tremayne"), ("Geoffrey", "Kareem"), ("Brett", "Darnell"), ("Brendan", "Tyrone"),
)  # fmt: skip
NAME_FRAMES = (
    "{name} is a good friend of mine.", "{name} asked the first question.", "We met {name} at the station.",
    "The letter was written by {name}.", "{name} has a new job in the city.", "I think that {name} is right.",
)  # fmt: skip
