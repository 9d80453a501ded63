"""Identifiers of persons in text replaced by their kind: "Dr. Adams" becomes "[name]".

Rules over text, no model: the eighteen identifiers of HIPAA's Safe Harbor (45 CFR 164.514 b 2) as
far as they have a form or a label, and words known from elsewhere, a DICOM header for one. A name
that stands alone, without title or label, is only found if it is known. Years and ages to 89 stay.
"""

import re
from collections import Counter

MONTHS = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    r"|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\.?"
)
_DAY, _MONTH = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:0?[1-9]|1[0-2])"
_YEAR = r"(?:19|20)\d\d"
_NAME = r"[^\W\d_][^\W\d_]*(?:['\u2019-][^\W\d_]+)*"
_CAPITAL = (
    r"(?:(?:van|von|der|den|de|da|di|del|la|le|al|bin)[ \t]+)*"
    r"(?:[A-Z]\.|[A-Z](?:['\u2019][^\W\d_]+|[^\W\d_]+)(?:['\u2019-][^\W\d_]+)*)"
)
_NAMES = rf"{_CAPITAL}(?:,?[ \t]+{_CAPITAL}){{0,3}}"
_LABEL = (
    r"(?i:patient(?:'s)?(?:[ \t]+name)?|name|attending|resident|radiologist|physician|surgeon"
    r"|referr(?:ed|ing)(?:[ \t]+(?:by|physician|doctor))?|ordered[ \t]+by|dictated[ \t]+by"
    r"|(?:electronically[ \t]+)?signed(?:[ \t]+by)?|transcribed[ \t]+by|interpreted[ \t]+by"
    r"|reported[ \t]+by|discussed[ \t]+with|called[ \t]+to|notified)"
)
_IDENTIFIER = (
    r"(?i:MRN|medical[ \t]+record(?:[ \t]+(?:number|no\.?))?|accession(?:[ \t]+(?:number|no\.?))?"
    r"|acc(?:oun)?t(?:[ \t]+(?:number|no\.?))?|patient[ \t]+(?:id|number|no\.?)"
    r"|case[ \t]+(?:id|number)|exam(?:ination)?[ \t]+id"
    r"|SSN|social[ \t]+security(?:[ \t]+(?:number|no\.?))?|NPI|DEA|NHS"
    r"|(?:license|licence|policy|member|insurance|certificate|serial|device)[ \t]+"
    r"(?:id|number|no\.?)|VIN|hosp(?:ital)?[ \t]+(?:id|number|no\.?))"
)
_STREET = (
    r"(?:Street|St\.|Avenue|Ave\.?|Road|Rd\.?|Boulevard|Blvd\.?|Drive|Lane|Ln\.?|Court"
    r"|Place|Parkway|Pkwy\.?|Highway|Hwy\.?|Square|Way)"
)
_STATES = (
    "AL|AK|AZ|AR|CA|CO|CT|DC|DE|FL|GA|HI|IA|ID|IL|IN|KS|KY|LA|MA|MD|ME|MI|MN|MO|MS|MT|NC|ND|NE|NH"
    "|NJ|NM|NV|NY|OH|OK|OR|PA|RI|SC|SD|TN|TX|UT|VA|VT|WA|WI|WV|WY"
)

_SEP = r"[ \t]+"
_SAID_BY = (
    r"\b(?i:(?:dictated|signed|transcribed|interpreted|ordered|reported|referred)[ \t]+by"
    r"|discussed[ \t]+with|notified)"
)
_STUDY = r"(?i:study|exam(?:ination)?|films?|radiographs?|x-?rays?|CT|MRI?|scan)"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_NTH = r"(?:st|nd|rd|th)?"

# in this order: what one has replaced the next does not see; the group `keep` stays
_RULES = (
    ("email", r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    ("url", r"(?i)\b(?:https?://|ftp://|www\.)[^\s<>\"')\]]+"),
    ("ip", rf"(?<![\d.])(?:{_OCTET}\.){{3}}{_OCTET}(?![\d.])"),
    ("id", r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])"),
    ("id", rf"(?P<keep>\b{_IDENTIFIER}[ \t]*(?:is|was|[#:=.])*[ \t#]*)(?=[\w-]*\d)[\w-]{{3,}}"),
    ("phone", r"(?<![\w.-])(?:\+?\d{1,3}[ .-])?\(?\d{3}\)?[ .-]{1,2}\d{3}[ .-]\d{4}(?![\w-])"),
    (
        "phone",
        r"(?P<keep>(?i:\b(?:tel|telephone|phone|fax|pager|beeper|mobile|cell|ext|extension)\b)"
        r"[ \t.:#]*(?i:number)?[ \t.:#]*)\+?[\d(][\d ().-]{2,}\d",
    ),
    ("date", rf"(?<![\w/.-]){_YEAR}([-/.]){_MONTH}\1{_DAY}(?![\w/-])"),
    ("date", rf"(?<![\w/.-])(?:{_MONTH}|{_DAY})([-/.])(?:{_DAY}|{_MONTH})\1{_YEAR}(?![\w/-])"),
    ("date", rf"(?<![\w/.-])(?:{_MONTH}/{_DAY}|{_DAY}/{_MONTH})/\d\d(?![\w/-])"),
    ("date", rf"(?i)\b{_DAY}{_NTH}[ -](?:of )?{MONTHS}[ -,]*\d{{4}}\b"),
    ("date", rf"\b{MONTHS}[ -]{_DAY}{_NTH}\b(?:,?[ -]+\d{{4}}\b)?"),
    (
        "date",
        rf"(?P<keep>\b(?:(?i:on|dated|since)|{_STUDY}{_SEP}(?i:of|from)){_SEP}){_MONTH}/{_DAY}"
        rf"(?![\w/%])(?![ \t]*(?i:views?|levels?|strength))",
    ),
    ("age", r"\b(?:9\d|1[0-2]\d)(?=[ -]?(?:(?i:years?|yrs?)\b|(?i:y/?o)\b))"),
    (
        "hospital",
        rf"\b(?!(?:The|This|Our|Your|In|At|From|Outside)\b){_CAPITAL}"
        rf"(?:{_SEP}(?:of{_SEP})?{_CAPITAL}){{0,4}}{_SEP}"
        r"(?:Hospital|Medical Cent(?:er|re)|Med(?:ical)? Ctr\.?|Clinic|Infirmary)\b",
    ),
    (
        "address",
        rf"\b\d{{1,5}}{_SEP}(?:[NSEW]\.?{_SEP})?(?:[A-Z][a-z]+{_SEP}){{1,3}}{_STREET}(?!\w)",
    ),
    (
        "address",
        rf"\b[A-Z][a-z]+(?:[ \t][A-Z][a-z]+)?,{_SEP}(?:{_STATES}){_SEP}\d{{5}}(?:-\d{{4}})?",
    ),
    ("name", rf"(?P<keep>\b(?:Drs?|Mrs?|Ms|Miss|Prof|Professor|Doctor|Nurse)\b\.?{_SEP}){_NAMES}"),
    ("name", rf"(?P<keep>\b{_LABEL}[ \t]*:[ \t]*(?:Drs?\.?{_SEP})?){_NAMES}(?!\w)"),
    ("name", rf"(?P<keep>{_SAID_BY}{_SEP})(?!Drs?\b|\[){_NAMES}(?!\w)"),
    ("name", rf"\b{_CAPITAL}(?:{_SEP}{_CAPITAL}){{1,2}},?{_SEP}(?:M\.?D|D\.?O|R\.?N|Ph\.?D)\b\.?"),
    ("name", rf"\b{_NAME}\^{_NAME}(?:\^{_NAME})*"),
)
RULES = tuple((kind, re.compile(pattern)) for kind, pattern in _RULES)


def _known_pattern(known) -> re.Pattern | None:
    """Words of at least three letters or digits, longest first, whole words only."""
    words = {w for entry in known for w in [entry, *re.split(r"[\s^=,]+", entry)] if len(w) >= 3}
    if not words:
        return None
    joined = "|".join(re.escape(w) for w in sorted(words, key=lambda w: (-len(w), w)))
    return re.compile(rf"(?<!\w)(?:{joined})(?!\w)", re.IGNORECASE)


def deidentify(text: str, known=()) -> tuple[str, Counter]:
    """Text with identifiers replaced by `[kind]`, and how many of each kind.

    Args:
        known: what is known to identify: a patient's name as `Family^Given`, numbers. Their words
            go wherever they stand.
    """
    counts: Counter = Counter()
    pattern = _known_pattern(known)
    if pattern is not None:
        text, counts["known"] = pattern.subn("[known]", text)

    for kind, rule in RULES:

        def replaced(match: re.Match, kind=kind) -> str:
            counts[kind] += 1
            return f"{match.groupdict().get('keep') or ''}[{kind}]"

        text = rule.sub(replaced, text)
    return text, +counts
