"""Scoring of IFEval's 25 kinds of instruction, as lm-evaluation-harness scores them. eval.py loads it for --tasks ifeval.

    python tests/tools/ifeval.py punctuation:no_comma "No commas here."        # one check on one reply

Kinds that need langdetect or nltk are left out, and counted as not scored, where the package is missing.
"""

import functools, importlib.util, inspect, json, re, sys  # noqa: E401
from typing import Any, Callable


def score(row: dict, reply: str) -> dict:
    """Strict: the reply as it is. Loose: any of eight ways to trim it. A row without its checker is not scored.

    Raises ValueError for an id that is none of IFEval's, and for arguments that its check cannot use.
    """
    if len(row["instruction_id_list"]) != len(row["kwargs"]):
        raise ValueError(f"{len(row['instruction_id_list'])} instruction ids, but {len(row['kwargs'])} kwargs")
    checks = list(zip(row["instruction_id_list"], row["kwargs"]))
    for name, arguments in checks:
        check_arguments(name, arguments)
    missing = [name for name, _ in checks if name not in ifeval_checks()]
    if missing:
        return {"prediction": reply, "target": None, "metrics": {}, "not_scored": missing}
    lines = reply.split("\n")
    trimmed = [reply] + ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    variants = trimmed + [text.replace("*", "") for text in trimmed]
    strict = [follows(reply, *check) for check in checks]
    loose = [any(follows(variant, *check) for variant in variants) for check in checks]
    metrics: dict[str, Any] = {}
    for kind, kept in (("strict", strict), ("loose", loose)):
        metrics[f"prompt_level_{kind}_acc"] = float(all(kept))
    for kind, kept in (("strict", strict), ("loose", loose)):
        metrics[f"inst_level_{kind}_acc"] = list(map(float, kept))
    return {"prediction": reply, "target": None, "metrics": metrics}


RELATIONS = ("less than", "at least")
PATTERNS = ("keywords", "keyword", "forbidden_words", "section_spliter")  # these become regular expressions


def check_arguments(name: str, arguments: dict) -> None:
    """Raise ValueError, before anything is generated, for an instruction that could not be checked."""
    if name not in IFEVAL:
        raise ValueError(f"unknown instruction id {name!r}")
    given = {key: value for key, value in arguments.items() if value}
    try:
        inspect.signature(IFEVAL[name]).bind("", **given)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
    for key, value in given.items():
        if key.endswith("relation") and value not in RELATIONS:
            raise ValueError(f"{name}: {key} {value!r} is not one of {', '.join(RELATIONS)}")
        for pattern in (value if isinstance(value, list) else [value]) if key in PATTERNS else []:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(f"{name}: {key} {pattern!r} is not a pattern ({error})") from None


def follows(reply: str, name: str, arguments: dict) -> bool:
    """Whether a reply that is not blank keeps one instruction; a blank one is checked too, for the arguments' sake."""
    given = {key: value for key, value in arguments.items() if value}
    return bool(ifeval_checks()[name](reply, **given)) and bool(reply.strip())


def related(count: int, relation: str, bound: int) -> bool:
    """The two relations of IFEval."""
    return count < bound if relation == "less than" else count >= bound


def split_ends(text: str, pattern: str) -> list[str]:
    """Parts between separators; a blank first or last one is dropped, a blank one in between leaves none."""
    parts = re.split(pattern, text)
    parts = parts[not parts[0].strip() : len(parts) - (not parts[-1].strip())]
    return parts if all(part.strip() for part in parts) else []


def nth_first_word(v: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """The first word of the nth of exactly so many paragraphs."""
    parts = v.split("\n\n")
    if sum(bool(part.strip()) for part in parts) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    words = parts[nth_paragraph - 1].split()
    if not words:
        return False
    found = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0]
    return found.lower() == first_word.lower()


def postscript(v: str, postscript_marker: str) -> bool:
    """A postscript with the marker."""
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = known.get(postscript_marker, rf"\s*{postscript_marker.lower()}.*$")
    return bool(re.findall(pattern, v.lower(), re.M))


def highlighted(v: str, num_highlights: int) -> bool:
    """Enough spans between asterisks that are not blank."""
    spans = re.findall(r"\*[^\n\*]*\*", v) + re.findall(r"\*\*[^\n\*]*\*\*", v)
    return sum(bool(span.strip("*").strip()) for span in spans) >= num_highlights


def is_json(v: str) -> bool:
    """JSON, in a code block or not."""
    v = v.strip()
    for opening in ("```json", "```Json", "```JSON", "```"):
        v = v.removeprefix(opening)
    try:
        json.loads(v.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def two_responses(v: str) -> bool:
    """Exactly two different parts around six asterisks."""
    parts = v.split("******")
    found = [part.strip() for i, part in enumerate(parts) if part.strip() or 0 < i < len(parts) - 1]
    return len(found) == 2 and all(found) and found[0] != found[1]


def bullets(v: str) -> int:
    """Lines that begin with one asterisk or a dash."""
    return len(re.findall(r"^\s*\*[^\*].*$", v, re.M)) + len(re.findall(r"^\s*-.*$", v, re.M))


def detected(v: str, language: str) -> bool:
    """Whether langdetect takes a text for this language; a text it cannot judge passes."""
    import langdetect

    langdetect.DetectorFactory.seed = 0  # it draws at random unless told not to
    try:
        return langdetect.detect(v) == language
    except langdetect.LangDetectException:
        return True


def pieces(v: str, of: str) -> list[str]:
    """nltk's sentences or words of a text."""
    import nltk

    return nltk.sent_tokenize(v) if of == "sentences" else nltk.word_tokenize(v)


def is_available(package: str) -> bool:
    """Whether an optional package is installed; nltk comes without the data that its tokenizers need."""
    if importlib.util.find_spec(package) is None:
        return False
    try:
        return package != "nltk" or bool(pieces("One. Two.", "sentences"))
    except LookupError:
        return False


# what a reply v is asked for, by instruction id: the arguments bear the names of the data's kwargs
IFEVAL = {
    "keywords:existence": lambda v, keywords: all(re.search(k, v, re.I) for k in keywords),
    "keywords:frequency": lambda v, keyword, frequency, relation:
        related(len(re.findall(keyword.strip(), v, re.I)), relation, frequency),
    "keywords:forbidden_words": lambda v, forbidden_words:
        not any(re.search(rf"\b{word}\b", v, re.I) for word in forbidden_words),
    "keywords:letter_frequency": lambda v, letter, let_frequency, let_relation:
        related(v.lower().count(letter.lower()), let_relation, let_frequency),
    "length_constraints:number_words": lambda v, num_words, relation:
        related(len(re.findall(r"\w+", v)), relation, num_words),
    "length_constraints:number_paragraphs": lambda v, num_paragraphs:
        len(split_ends(v, r"\s?\*\*\*\s?")) == num_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_first_word,
    "length_constraints:number_sentences": lambda v, num_sentences, relation:
        related(len(pieces(v, "sentences")), relation, num_sentences),
    "detectable_content:number_placeholders": lambda v, num_placeholders:
        len(re.findall(r"\[.*?\]", v)) >= num_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": lambda v, num_bullets: bullets(v) == num_bullets,
    "detectable_format:constrained_response": lambda v:
        any(f"My answer is {answer}." in v for answer in ("yes", "no", "maybe")),
    "detectable_format:number_highlighted_sections": highlighted,
    "detectable_format:multiple_sections": lambda v, section_spliter, num_sections:
        len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", v)) - 1 >= num_sections,
    "detectable_format:json_format": is_json,
    "detectable_format:title": lambda v: any(t.strip("<>").strip() for t in re.findall(r"<<[^\n]+>>", v)),
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": lambda v, prompt_to_repeat:
        v.strip().lower().startswith(prompt_to_repeat.strip().lower()),
    "startend:end_checker": lambda v, end_phrase:
        v.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
    "startend:quotation": lambda v: len(v.strip()) > 1 and v.strip()[0] == v.strip()[-1] == '"',
    "punctuation:no_comma": lambda v: "," not in v,
    "language:response_language": detected,
    "change_case:english_capital": lambda v: v.isupper() and detected(v, "en"),
    "change_case:english_lowercase": lambda v: v.islower() and detected(v, "en"),
    "change_case:capital_word_frequency": lambda v, capital_frequency, capital_relation:
        related(sum(word.isupper() for word in pieces(v, "words")), capital_relation, capital_frequency),
}
NEEDS = {
    "langdetect": ("language:response_language", "change_case:english_capital",
                   "change_case:english_lowercase"),
    "nltk": ("length_constraints:number_sentences", "change_case:capital_word_frequency"),
}


@functools.cache
def ifeval_checks() -> dict[str, Callable[..., bool]]:
    """The checkers by instruction id, without those whose package is not installed."""
    missing = {name for package, names in NEEDS.items() if not is_available(package) for name in names}
    return {name: check for name, check in IFEVAL.items() if name not in missing}

if __name__ == "__main__":
    print(follows(sys.argv[2], sys.argv[1], json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}))
