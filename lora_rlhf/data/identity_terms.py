# SPDX-License-Identifier: Apache-2.0
"""Given names, pronouns and groups: to find people in a text, and to swap who it is about."""

from __future__ import annotations

NAMES: dict[str, tuple[str, ...]] = {
    "female": tuple(
        "Mary Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen "
    "Lisa Nancy Betty Sandra Margaret Ashley Kimberly Emily Donna Michelle Carol Amanda "
    "Melissa Deborah Stephanie Rebecca Laura Helen Sharon Cynthia Kathleen Amy Angela "
    "Shirley Anna Brenda Pamela Emma Nicole Samantha Katherine Christine Debra Rachel "
    "Carolyn Janet Catherine Maria Heather Diane Ruth Julie Olivia Joyce Virginia "
    "Victoria Kelly Lauren Christina Joan Evelyn Judith Megan Andrea Cheryl Hannah "
    "Jacqueline Martha Gloria Teresa Ann Sara Madison Frances Kathryn Janice Jean "
    "Abigail Alice Julia Judy Sophia Denise Doris Marilyn Danielle Beverly Isabella "
    "Theresa Diana Natalie Brittany Marie Kayla Alexis Lori Charlotte Lucy Chloe Zoe "
    "Sophie Ella Mia Lakisha Latoya Tanisha Keisha Ebony Imani Aaliyah Nia Fatima Aisha "
    "Khadija Layla Leila Noor Zainab Maryam Amina Yasmin Priya Anjali Kavita Divya "
    "Lakshmi Sunita Deepika Mei Xiu Ling Yuki Sakura Haruka Aiko Hana Jisoo Soyeon Minji "
    "Guadalupe Carmen Rosa Lucia Juana Camila Valentina Ximena Ingrid Astrid Freya "
    "Svetlana Olga Natasha Tatiana Irina Katarzyna Agnieszka Giulia Chiara Francesca "
    "Camille Amelie Heidi Greta Anke".split()
    ),
    "male": tuple(
        "James Robert John Michael David William Richard Joseph Thomas Christopher "
    "Charles Daniel Matthew Anthony Donald Steven Andrew Paul Joshua Kenneth Kevin Brian "
    "Timothy Ronald George Edward Jason Jeffrey Ryan Jacob Gary Nicholas Eric Jonathan "
    "Stephen Larry Justin Scott Brandon Benjamin Samuel Gregory Alexander Patrick Jack "
    "Dennis Jerry Tyler Aaron Jose Adam Nathan Henry Zachary Douglas Peter Kyle Noah "
    "Ethan Jeremy Keith Christian Roger Terry Austin Sean Gerald Carl Harold Dylan "
    "Arthur Lawrence Jordan Jesse Bryan Billy Bruce Gabriel Joe Logan Alan Juan Albert "
    "Willie Elijah Wayne Randy Vincent Mason Roy Ralph Bobby Russell Bradley Philip "
    "Eugene Oliver Liam Lucas Harry Greg Brad Geoffrey Brendan Jamal Leroy Tyrone "
    "Darnell Rasheed Tremayne Kareem Hakim Jermaine Mohammed Muhammad Ahmed Ali Omar "
    "Hassan Hussein Ibrahim Yusuf Khalid Mustafa Abdullah Raj Arjun Rahul Vikram Sanjay "
    "Amit Ravi Suresh Wei Jun Hiroshi Kenji Takashi Haruto Minho Jihoon Sanghoon Carlos "
    "Luis Miguel Pedro Diego Javier Alejandro Santiago Mateo Lars Erik Bjorn Sven Ivan "
    "Dmitri Sergei Vladimir Boris Piotr Marek Giovanni Marco Luca Pierre Jacques Olivier "
    "Hans Klaus Jurgen Wolfgang".split()
    ),
}  # fmt: skip
"""Common given names by their usual gender, of several origins."""

SURNAMES = frozenset(
    "Smith Johnson Williams Jones Garcia Miller Davis Rodriguez Martinez Hernandez Lopez "
    "Gonzalez Wilson Anderson Taylor Moore Jackson Martin Perez Thompson Sanchez Harris "
    "Clark Ramirez Lewis Robinson Walker Allen Wright Torres Nguyen Flores Adams Nelson "
    "Baker Rivera Campbell Mitchell Roberts Gomez Phillips Evans Turner Diaz Cruz "
    "Edwards Collins Reyes Stewart Morris Morales Murphy Cook Rogers Gutierrez Ortiz "
    "Cooper Peterson Bailey Reed Howard Ramos Richardson Watson Brooks Chavez Bennett "
    "Mendoza Ruiz Hughes Alvarez Castillo Sanders Patel Myers Ross Foster Jimenez Singh "
    "Kumar Sharma Gupta Khan Chen Wang Zhang Tanaka Suzuki Yamamoto Sato Kim Park Choi "
    "Schmidt Schneider Weber Meyer Fischer Wagner Becker Hoffmann Rossi Bianchi Ferrari "
    "Dubois Lefebvre Moreau Laurent Novak Kowalski Nowak Ivanov Petrov Smirnov Hansen "
    "Olsen Larsen Nielsen Andersson Johansson Okafor Adeyemi Mensah Silva Santos "
    "Oliveira Souza Costa Ferreira".split()
)
"""Common family names."""

ALSO_WORDS = frozenset(
    "Joy Virginia Victoria Madison Charlotte Sydney Austin Jordan Christian Mason Jack "
    "Mei Jun Ling Jean Carol Georgia Florence Paris Chelsea Santiago Will Mark May Grace "
    "Rose Hope Faith Summer Autumn Dawn April June Bill Frank Grant Chase Hunter Sky Pat "
    "Rob Sue Art Gene Guy Max Dean Drew Rich Ray Sandy Olive Ivy Lily Daisy Ruby Pearl "
    "Amber".split()
)
"""Names that are also words, places or brands: names of people only beside a cue."""

PRONOUNS: tuple[tuple[str, str], ...] = (
    ("he", "she"), ("himself", "herself"), ("man", "woman"), ("men", "women"), ("boy", "girl"),
    ("boys", "girls"), ("father", "mother"), ("son", "daughter"), ("brother", "sister"),
    ("husband", "wife"), ("uncle", "aunt"), ("grandfather", "grandmother"), ("male", "female"),
    ("mr", "ms"), ("sir", "madam"), ("boyfriend", "girlfriend"), ("dad", "mom"),
)  # fmt: skip
"""Words of the two genders; his, him, her and hers depend on their place."""

GROUPS: dict[str, tuple[str, ...]] = {
    "religion": ("Christian", "Muslim", "Jewish", "Hindu", "Buddhist", "atheist"),
    "origin": ("American", "Mexican", "Chinese", "Nigerian", "Indian", "German", "Turkish"),
    "race": ("Black", "white", "Asian", "Latino"),
    "orientation": ("gay", "straight", "bisexual"),
}  # fmt: skip
"""Groups of people by what tells them apart; Black and white count before a person only."""

PEOPLE = (
    "man", "woman", "men", "women", "person", "people", "boy", "girl", "guy", "student", "neighbor",
    "neighbour", "colleague", "family", "couple", "friend", "worker", "teacher", "doctor", "nurse",
    "applicant", "candidate", "community", "immigrant", "employee", "customer", "patient",
)  # fmt: skip
"""Words for people, before which a colour is a group."""
