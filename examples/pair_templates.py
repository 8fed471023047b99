"""Sixteen topics of everyday questions, each in two wordings that mean the same.

A topic is a question and an answer with two slots; every value of a slot comes in two wordings as well. Rows of one
topic share all but a few words, and a paraphrase says one of its slots in the words of the row that it was made from:
so do several other rows of the topic, and a search by words alone cannot tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """Question and answer in a first and a second wording, and the values of the two slots, each in both wordings."""

    name: str
    ask: tuple[str, str]
    answer: tuple[str, str]
    first: tuple[tuple[str, str], ...]
    second: tuple[tuple[str, str], ...]


def _values(text: str) -> tuple[tuple[str, str], ...]:
    """``"a = b; c = d"`` -> (("a", "b"), ("c", "d"))."""
    return tuple((left.strip(), right.strip()) for left, right in (part.split("=") for part in text.split(";")))


def _topic(name: str, ask: str, asked: str, answer: str, answered: str, first: str, second: str) -> Topic:
    return Topic(name, (ask, asked), (answer, answered), _values(first), _values(second))


TOPICS = (
    _topic(
        "cooking",
        "How do I cook {0} for {1}?",
        "Could you tell me a way to prepare {0} when {1} will be eating?",
        "Wash the {0}, season with salt and roast everything for half an hour. That amount suits {1}.",
        "Rinse your {0}, sprinkle some spices and bake until tender, about 30 minutes; make enough "
        "so that {1} get full.",
        "potatoes = spuds; eggplants = aubergines; courgettes = zucchini; prawns = shrimp; chickpeas = garbanzo beans",
        "two people = a couple; six people = half a dozen guests; my kids = the children; a crowd = lots of visitors",
    ),
    _topic(
        "vehicles",
        "The {0} of my {1} stopped working. What should I check first?",
        "Something is wrong: on our {1} the {0} failed. Where do we begin to look?",
        "Start with fuses and cables near the {0}, then let a mechanic inspect the {1}.",
        "Examine the wiring around the {0} for obvious faults; afterwards bring the {1} to a garage.",
        "brakes = stopping system; engine = motor; headlights = front lamps; heating = warm air; horn = hooter",
        "taxi = cab; lorry = truck; camper = motorhome; motorbike = two-wheeler",
    ),
    _topic(
        "gardening",
        "When should I plant {0} in {1}?",
        "What is the right month to put {0} into the soil of {1}?",
        "Plant {0} after the last frost. In {1} they need water every second day.",
        "Wait until nights stay above freezing before setting {0}; {1} must be kept moist.",
        "tulips = spring bulbs; maize = sweetcorn; lettuces = salad greens; beetroots = red beets; "
        "berries = soft fruit",
        "a pot = a container; a greenhouse = a glasshouse; sandy ground = light earth; a shady yard = a dark backyard",
    ),
    _topic(
        "travel",
        "I want to visit {0} in {1}. What should I see?",
        "Which sights would you recommend for a trip during {1} to {0}?",
        "In {0} begin with the old town and the museums. In {1} book a hotel early.",
        "Stroll through the historic centre and galleries of {0}; reserve your room well ahead for {1}.",
        "Paris = the French capital; Rome = the Italian capital; Vienna = the Austrian capital; "
        "Cairo = the Egyptian capital; Tokyo = the Japanese capital",
        "winter = the cold season; summer = the hot months; April = early spring; October = the middle of autumn",
    ),
    _topic(
        "letters",
        "Write a short note to {0} about {1}.",
        "Compose a brief message that informs {0} of {1}.",
        "Hello, I am writing to let {0} know about {1}. Please tell me if you have questions. Best wishes.",
        "Good day! This is to inform {0} of {1}. Do not hesitate to ask for details. Kind regards.",
        "my boss = the manager; my landlord = the house owner; a teacher = an instructor; "
        "the doctor = the physician; a customer = a client",
        "being late = a delay; a holiday = time off; a broken window = damaged glass; a payment = a bank transfer",
    ),
    _topic(
        "fitness",
        "Which exercise helps against {0} if I {1}?",
        "I {1}: what kind of workout reduces {0}?",
        "Try slow stretching for ten minutes a day. It relieves {0} even if you {1}.",
        "Gentle mobility training every morning eases {0}, also for all who {1}.",
        "back pain = an aching spine; stiff shoulders = a tight upper body; poor sleep = insomnia; "
        "stress = tension; weak knees = unstable leg joints",
        "sit all day = work at a desk; grow old = get on in years; travel often = spend much time on the road; "
        "have little time = get by with a full calendar",
    ),
    _topic(
        "pets",
        "Why does my {0} {1} at night?",
        "What makes a {0} {1} after dark?",
        "A {0} may {1} when it is bored or hungry. Play with it in the evening and feed it later.",
        "Lack of activity or appetite leads a {0} to {1}; give it more games and a late meal.",
        "dog = hound; cat = kitten; parrot = talking bird; pony = small horse; rabbit = bunny",
        "cry = whine; scratch the door = claw at the entrance; run around = dash about; hide = conceal itself",
    ),
    _topic(
        "programming",
        "How can I {0} in {1}?",
        "Show me the usual approach to {0} using {1}.",
        "Use a function of the standard library to {0}. In {1} this takes one line, and a test should cover it.",
        "There is a built-in that lets you {0}; with {1} a single statement is enough, plus a check.",
        "sort a list = order an array; read a file = load a document from disk; join strings = concatenate text; "
        "count words = tally tokens; round numbers = cut off decimals",
        "Python = a script language; Java = an object-oriented language; a shell = the command line; "
        "a spreadsheet = a table program",
    ),
    _topic(
        "inventions",
        "Who invented the {0}, and how did it change {1}?",
        "Name the creators of the {0} and describe its effect on {1}.",
        "Several people worked on the {0} at once. It made {1} faster and cheaper within a few years.",
        "The {0} had many parents; soon afterwards {1} became quicker at lower cost.",
        "telephone = speaking device; aeroplane = flying machine; light bulb = electric lamp; "
        "bicycle = pedal vehicle; camera = photographic apparatus",
        "trade = commerce; war = armed conflict; farming = agriculture; education = schooling",
    ),
    _topic(
        "studying",
        "How do I learn {0} {1}?",
        "Suggest a plan for mastering {0} {1}.",
        "Split {0} into small parts, repeat them daily and test yourself. It works {1} too.",
        "Divide the material of {0} into pieces, review each day, take quizzes; this succeeds {1} as well.",
        "chemistry = the science of substances; algebra = equations with unknowns; Spanish "
        "vocabulary = words of Castilian; "
        "anatomy = the parts of the body; music theory = harmony and rhythm",
        "in a week = within seven days; without a tutor = on my own; before an exam = ahead of a test; "
        "with a job = next to full-time work",
    ),
    _topic(
        "money",
        "How much should I save for {0} if I {1}?",
        "What sum ought to be put aside towards {0} by people who {1}?",
        "Keep a tenth of your income for {0}. If you {1}, move it to an account you do not touch.",
        "Set ten per cent of what you earn apart for {0}; those who {1} are best served by a locked deposit.",
        "a house = real estate; a wedding = a marriage ceremony; old age = retirement; "
        "repairs = fixing things; university = college fees",
        "rent a flat = live in a leased apartment; have debts = owe money; freelance = run their own business; "
        "earn little = get a low wage",
    ),
    _topic(
        "instruments",
        "Is the {0} a good instrument for {1}?",
        "Would {1} do well to take up the {0}?",
        "Yes, the {0} is easy to begin with. After three months of practice {1} can play simple songs.",
        "Certainly: starting the {0} is not hard, and {1} can manage short tunes once they have "
        "trained for a quarter of a year.",
        "violin = fiddle; piano = keyboard; flute = woodwind pipe; drum kit = percussion set; guitar = six-string",
        "beginners = newcomers; small hands = people with short fingers; pensioners = seniors; a "
        "toddler = a very young child",
    ),
    _topic(
        "repairs",
        "How do I fix a {0} in {1}?",
        "The {0} we have in {1} needs mending; which steps are necessary?",
        "Turn off the power or water first. Then clean the {0}, replace worn parts and dry {1}.",
        "Shut the main supply, remove dirt from the {0}, swap damaged pieces, and air {1} afterwards.",
        "dripping tap = leaking faucet; blocked drain = clogged pipe; loose tile = unstuck wall plate; "
        "squeaky door = noisy hinge; cold radiator = dead heater",
        "the bathroom = the washroom; the cellar = the basement; a rented flat = a leased "
        "apartment; the attic = the loft",
    ),
    _topic(
        "gifts",
        "Suggest a present for {0} who likes {1}.",
        "What could I give to {0} with a passion for {1}?",
        "A day out about {1} would please {0}. A book on it is cheaper and lasts longer.",
        "Take {0} on an excursion around {1}, or buy a guide to the subject if funds are short.",
        "a sister = a female sibling; a colleague = a co-worker; a grandfather = an old relative; "
        "a neighbour = the person next door; a teenager = an adolescent",
        "fishing = angling; films = the cinema; baking = making cakes; stars = astronomy",
    ),
    _topic(
        "clothing",
        "What should I wear to {0} when it is {1}?",
        "Which outfit fits {0} in {1} conditions?",
        "For {0} choose layers that you can take off. On a {1} day add shoes with a firm sole.",
        "Combine several thin garments for {0}; sturdy footwear is advisable under {1} skies.",
        "an interview = a job talk; a funeral = a burial; a hike = a long walk; an opera = a stage performance; "
        "a barbecue = an outdoor grill",
        "rainy = wet; windy = stormy; freezing = icy; humid = muggy",
    ),
    _topic(
        "stories",
        "Invent the beginning of a {0} about {1}.",
        "Make up the first lines of a {0} in which {1} appear.",
        "Nobody had expected a {0} to start like this, but {1} stood in the middle of the road and smiled.",
        "It was a strange opening for a {0}: in the street, to everyone's surprise, waited {1}, grinning.",
        "fairy tale = children's legend; thriller = crime novel; comedy = funny play; "
        "love story = romance; ghost story = spooky yarn",
        "pirates = sea robbers; robots = thinking machines; wolves = grey hunters; twins = identical siblings",
    ),
)
