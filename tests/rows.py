"""A few documents of our own in the layout of each benchmark, for make_lm_eval_goldens.py and test_benchmarks.py."""

TRUTHFULQA_PROMPT = (
    "Q: Who jumps over the dog?\nA: The quick brown fox.\n\nQ: What is 12 plus 30?\nA: It is 42."
)
ROWS = {
    "boolq.jsonl": [
        {
            "question": "is the river long",
            "passage": "River -- The river is long. It comes from the hills.",
            "label": 1,
            "idx": 0,
        },
        {
            "question": "does the dog jump",
            "passage": "Dog -- The lazy dog sleeps, “always”.",
            "label": 0,
            "idx": 1,
        },
        {
            "question": "is twelve a number",
            "passage": "Numbers -- 12 and 30 make 42.\nSo they say.",
            "label": 1,
            "idx": 2,
        },
    ],
    "logiqa.jsonl": [
        {
            "label": "b",
            "context": "All foxes are quick. This is a fox.",
            "question": "What follows?",
            "options": ["It is slow", "It is quick, and brown", "It is a dog", "Nothing"],
        },
        {
            "label": "d",
            "context": "The water comes from the north.",
            "question": "Where are the hills?",
            "options": ["south", "east", "west", "in the north"],
        },
    ],
    "arc_challenge.jsonl": [
        {
            "id": "a1",
            "question": "Which thing is long?",
            "choices": {"text": ["the river", "a dog", "42"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        },
        {
            "id": "a2",
            "question": "What does the fox do?",
            "choices": {
                "text": [
                    "It jumps over the dog.",
                    "sleep",
                    "Thank you for the question!",
                    "first, second",
                    "no",
                ],
                "label": ["1", "2", "3", "4", "5"],
            },
            "answerKey": "4",
        },
    ],
    "truthfulqa.jsonl": [
        {
            "question": "Why is the river so long?",
            "mc1_targets": {
                "choices": ["The water comes from the hills.", "The fox is quick.", "It is 42."],
                "labels": [1, 0, 0],
            },
            "mc2_targets": {
                "choices": ["The fox.", "The hills are far.", "The water comes from the hills."],
                "labels": [0, 1, 1],
            },
        },
        {
            "question": "What is 1 plus 1?",
            "mc1_targets": {"choices": ["It is 2.", "It is 3."], "labels": [1, 0]},
            "mc2_targets": {"choices": ["It is 2.", "Two", "It is 3.", "a dog"], "labels": [1, 1, 0, 0]},
        },
    ],
    "lambada.jsonl": [
        {"text": "The quick brown fox jumps over the lazy dog"},
        {"text": "Tell me the name of the river, and why it is so long"},
        {"text": "He read the sign again. It said of\n\nPower"},
    ],
    "asdiv.jsonl": [
        {
            "body": "There are two dogs and three foxes.",
            "question": "How many are there?",
            "solution_type": "Sum",
            "answer": "5 (animals)",
            "formula": "2+3=5",
        },
        {
            "body": "Twelve plus thirty.",
            "question": "How much? ",
            "solution_type": "Sum",
            "answer": "42",
            "formula": "12+30=42",
        },
    ],
    "arithmetic.jsonl": [
        {"subtask": "arithmetic_2da", "context": "\n\nQ: What is 12 plus 30?\n\nA:", "completion": " 42"},
        {"subtask": "arithmetic_2da", "context": "\n\nQ: What is 1 plus 1?\n\nA:", "completion": " 2"},
    ],
}
IFEVAL = [  # (instruction ids, arguments, replies)
    (
        ["punctuation:no_comma", "length_constraints:number_words"],
        [{}, {"relation": "at least", "num_words": 4}],
        ["So it is and so on", "Well, no", "Sure, here:\nfive plain words right here", ""],
    ),
    (
        ["detectable_format:title", "detectable_format:number_bullet_lists"],
        [{}, {"num_bullets": 2}],
        ["<<A title>>\n* one\n- two", "<< >>\n* one\n* two", "<<x>>\n* one\n** two\n- three"],
    ),
    (
        ["startend:quotation", "keywords:letter_frequency"],
        [{}, {"letter": "o", "let_relation": "less than", "let_frequency": 2}],
        ['"no"', '"noon"', "no"],
    ),
    (
        ["combination:two_responses", "keywords:existence"],
        [{}, {"keywords": ["fox", "dog"]}],
        [
            "a fox ****** a dog",
            "a fox\n******\na fox",
            "******\nfox\n******\nDOG\n******",
            "fox ****** ****** dog",
        ],
    ),
    (
        ["length_constraints:nth_paragraph_first_word", "detectable_content:postscript"],
        [{"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"}, {"postscript_marker": "P.P.S"}],
        ["First.\n\nThen, p.p.s so", "First.\n\n'Then\n\nP.P.S.", "One\n\nthen again\nP. P. S. x"],
    ),
    (
        ["length_constraints:number_paragraphs", "keywords:forbidden_words"],
        [{"num_paragraphs": 2}, {"forbidden_words": ["dog"]}],
        ["a\n***\nb", "*** a *** b ***", "a *** *** b", "the dogs *** here", "dog *** b"],
    ),
    (
        ["detectable_format:json_format", "keywords:frequency"],
        [{}, {"keyword": "x", "relation": "at least", "frequency": 2}],
        ['```json\n{"x": "x"}\n```', "{x: x}", '[1, "xx"]'],
    ),
    (
        ["detectable_format:multiple_sections", "detectable_format:number_highlighted_sections"],
        [{"section_spliter": "PART", "num_sections": 2}, {"num_highlights": 2}],
        ["PART 1\n*a*\nPART 2\n**b**", "Part 1 *a* Part 2 *b*", "PART1 * * PART2 *x*"],
    ),
    (
        ["combination:repeat_prompt", "startend:end_checker"],
        [{"prompt_to_repeat": "Say it."}, {"end_phrase": "Done."}],
        ["say it. And so DONE.", "It is said. done", 'Say it. "Done."'],
    ),
    (
        ["detectable_format:constrained_response", "detectable_content:number_placeholders"],
        [{}, {"num_placeholders": 1}],
        ["My answer is yes. [x]", "my answer is yes. []", "My answer is no. x"],
    ),
]
