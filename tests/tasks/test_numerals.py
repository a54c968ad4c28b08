"""Numbers by value: what each form is worth, what is no number, and that writing a value in another form keeps it."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_arena.tasks.numerals import SEARCHED_CHARACTERS, find_forms, written
from peft_arena.tasks.scorers import extract_number, numeric

VALUES = {
    "0.5": [
        ".5", "0.50", "1/2", "½", " 1 / 2 ", "5e-1", "&frac12;", "\\frac{1}{2}",
        "$\\dfrac{1}{2}$", "\\frac12", "4/8 cup", "０．５",
    ],
    "5": [
        "5.", "5.0", "+5", "05", "#5", "x = 5", "x=5", "5 clips, altogether.", "5kg", "5 m^2", "5 m²", "5°C", "5!",
        "**5**", "\\boxed{5}", "\\text{5 apples}", "5\\text{ apples}", "\\(5\\)", "$$5$$", "<b>5</b>", "-> 5",
        "no. 5", "5th", "~5", "5,", "answer: 5", "答案是5", "５", "٥", "५", "\u200e5", "a total of five, that is 5",
        "30/6", "= (5)", "(x = 5)", "&#53;", "5\ufe0f\u20e3", "5 m", "5 mm", "5 minutes", "5 miles", "5 tons",
        "5 seconds", "$5 m$", "$5 a dozen", "a score of 5", "a single 5", "cost 5", "cut in half to 5", "5\nHalf of it",
        "---\n5",
    ],
    "-5": [
        "-5.0", "−5", "- 5", "–5", "－５", "-$5", "$-5", "- $5", "($5)", "-USD 5", "minus 5", "the answer is - 5",
        "(-5)", "-  5", "&minus;5", "-(5)", "negative 5",
    ],
    "29": [
        "$29.00", "29 €", "€29", "USD 29", "USD29", "29 USD", "US$29", "R$ 29", "Rs. 29", "£29", "\\$29", "29$",
    ],
    "1000": [
        "1,000", "1 000", "1\u00a0000", "1\u202f000", "1'000", "1\u2019000", "1_000", "1e3", "1.e3", "1E+3",
        "10^3", "10**3",
        "10³", "10^{3}", "1{,}000", "1,\\!000", "1\\,000", "1 x 10^3", "1×10³", "1*10^3", "1 \\times 10^{3}", "1k",
        "1 thousand", "1K", "１，０００", "١٬٠٠٠", "1,000.00", "10 hundred", "1\u2009000",
    ],
    "100000": [
        "1,00,000", "100,000", "1 lakh", "10^5", "$100k", "100 000", "1e5", "10万",
    ],
    "1234567.5": [
        "1,234,567.50", "12,34,567.5", "1 234 567.5", "1'234'567.5", "1.2345675e+06",
    ],
    "0.0025": [
        "2.5e-3", "2.5E-03", "2.5×10⁻³", "2.5 x 10^-3", "2.5 \\cdot 10^{-3}", "1/400", "25*10^(-4)",
    ],
    "2.5": [
        "2 1/2", "2½", "2 ½", "2\\frac{1}{2}", "5/2", "2 \u00bd cups", "\u2212\u00bd+3 = 2.5",
        "2 and a half", "2 and 1/2", "2 1/2 inches", "25e-1",
    ],
    "-0.5": [
        "-1/2", "-½", "-\\frac{1}{2}", "\\frac{-1}{2}", "-.5",
    ],
    "50": [
        "50%", "50 %", "50\\%", "50 percent", "50٪", "5e1 %",
    ],
    "3000000": [
        "3 million", "3 Million", "$3M", "$3m", "3,000 thousand", "3*10^6", "3mn", "€3 mio", "3百万", "$3 M",
        "€3 M", "3 M€",
        "3 M USD", "3  million", "3Mio",
    ],
    "24": [
        "2 dozen", "2 dozens", "#### 24", "6*4 = 24", "It is 24, not 25.", "<<6*4=24>>24",
    ],
    "1": [
        "1.000", "1.", "100e-2", "1st",
    ],
}  # fmt: skip
NO_NUMBERS = [
    "12:30", "12:30:45", "1:2", "3 : 4", "12h30", "5pm", "5 p.m.", "2024-05-01", "01/02/2024", "2024年5月1日", "1.2.3",
    "v1.2.3", "192.168.0.1", "+1-555-123-4567", "(555) 123-4567", "555 1234 99", "0x1F", "0xFF", "0b101", "12ab34",
    "B12", "COVID-19", "1,23", "0,5", "1.234,56", "1,2,3", "1,0000", "1 00", "12_34", "101₂", "3-5", "3–5", "3—5",
    "3 - 5", "3 to 5", "3 or 5", "between 3 and 5", "3..5", "5±1", "5-3", "5 + 3", "2 x 3", "3x4", "5*3", "5 plus 3",
    "2(3)", "5/0", "1/2/3", "2 3/2", "x/5", "1e400", "1e-400", "10^10^10", "10^999999", "9" * 301, "1e3e3", "1e5.5",
    "2^0.5", "2^n", "(-2)^3", "5x", "2π", "2pi", "3i", "√5", "\\sqrt{5}", "2\\sqrt{3}", "\\frac{x}{5}", "log(5)",
    "f(5)", "x^2", "x_2", "<5", ">= 5", "≥5", "at least 5", "more than 5", "5+", "5-", "--5", "(5)", "(1,234.50)",
    "5M", "5B", "2 thirds", "5 hundredths", "2 hours 30 minutes", "2h 30min", "5'10\"", "5 feet 10 inches",
    "$5mm", "2 million five hundred thousand", "5 million and one", "5 Milliarden", "5 Tsd", "5 mil", "5mil",
    "5 millones", "5 Millionen", "5 млн", "5 MEUR", "5 M", "5 B", "½ a dozen", "1 e3", "1e 3", "3 squared", "5 cubed",
    "square root of 4", "cube of 3", "log 100", "log_2 8", "\\log_{10} 100", "sin 30", "\\sin 30", "5 factorial",
    "3 to the power of 2", "2 to the 5th", "3 squared plus 2", "5 mod 3", "-\n5", "—5", "(minus) 5", "moins 5",
    "minus minus 5", "square root of minus 5", "5 USD-", "5€-", "−(−5)", "-(-5)", "|-5|", "5 below zero",
    "5 °C below zero", "5 negative", ",5", "$,5", "3 quarters", "2 and a half million", "5 and two thirds",
    "half of 5", "5 Viertel", "0.3 repeating", "3.1\u0305", "0.(3)", "0.\\overline{3}", "1.234,- €", "5.-",
    "1 one-half", "5 ten-thousandths", "5 centièmes", "(-) 5", "negative: 5", "5 −", "∜16", "5 doz", "5 万", "5만",
    "5 C 2", "5.\u03053", "42 plus or minus 1", "5 Cr", "**5** million",
    "5\\text{ thousand}", "$5$ million", "5 (million)", "5 point five", "twenty 5", "two million 500",
    "$5 and 30 cents", "not 5", "Total - 5", "five", "∞", "NaN", "",
]  # fmt: skip


@pytest.mark.parametrize(("value", "form"), [(value, form) for value, forms in VALUES.items() for form in forms])
def test_forms_are_read_by_value(value: str, form: str) -> None:
    assert extract_number(form) == value
    assert numeric([form], value).value == numeric([value], form).value == numeric([form], form).value == 1.0
    assert numeric([value], f"{form} " if form.startswith("(") else f"So it is {form}").value == 1.0


@pytest.mark.parametrize("form", NO_NUMBERS)
def test_what_is_not_understood_is_no_number_on_either_side(form: str) -> None:
    assert extract_number(form) == ""
    judged = numeric([form], form)
    assert judged.value is None and judged.reason.startswith("the answer ")
    for digit in "0123456789":
        assert numeric([digit], form).value == 0.0
        assert numeric([form], digit).value != 1.0
        assert numeric([digit], f"I say {form}").value == 0.0 or form == "(5)"  # only as a whole may it be an account


@pytest.mark.parametrize(
    ("gold", "said", "value"),
    [
        ("0.5", "50%", 0.0),
        ("50%", "0.5", 0.0),
        ("1000", "1.000", 0.0),
        ("5", "The answer is 5 (step 3).", 1.0),
        ("5", "The answer is **5**, since 2 and 3 are given.", 1.0),
        ("5", "The answer is 2 + 3 = 5 of 7", 1.0),
        ("6", "The answer is 5. Wait, it is 6.", 1.0),
        ("5", "The answer is 5. The answer is 6.", 0.0),
        ("5", "Answer: 12:30, or 5", 0.0),
        ("5", "5 of 7", 0.0),
        ("7", "5 of 7", 1.0),
        ("5", "\\boxed{5}, in 3 steps", 1.0),
        ("5", "\\boxed{3, 5}", 0.0),
        ("7", "3 + 4 = 7\n#### 7 (or 8)", 1.0),
        ("7", "it is 7 ####", 0.0),
        ("18", "She makes 9 * 2 = $18 every day.\n#### 18", 1.0),
        ("16 - 3 - 4 = 9", "9", 1.0),
    ],
)
def test_which_number_of_a_text_counts(gold: str, said: str, value: float) -> None:
    assert numeric([gold], said).value == value


@pytest.mark.parametrize("gold", ["3 and 5", "(3, 4)", "3, 4, 5", "x = 3, y = 4", "Step 1: 5", "3 of 5"])
def test_an_accepted_answer_of_several_numbers_is_refused(gold: str) -> None:
    judged = numeric([gold], gold)
    assert judged.value is None and "several numbers" in judged.reason
    assert numeric([gold], "5").value == 0.0


DIGITS = st.sampled_from(["0123456789", "０１２３４５６７８９", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९"])
WRAPS = [
    "{}",
    " {} ",
    "**{}**",
    "${}$",
    "\\boxed{{{}}}",
    "{} apples",
    "x = {}",
    "So the answer is {}.",
    "#### {}",
    "{}%",
    "{} €",
]


def grouped(digits: str, sign: str, *, indian: bool = False) -> str:
    """Put a sign between groups of digits: of three, or in the Indian way of two before the last three."""
    if indian:
        head, tail = digits[:-3], digits[-3:]
        pairs = [head[max(0, end - 2) : end] for end in range(len(head), 0, -2)]
        return sign.join([*reversed(pairs), tail])
    return f"{int(digits):,}".replace(",", sign)


@st.composite
def numbers(draw: st.DrawFn) -> tuple[Fraction, str, str]:
    """Draw a value and two ways of writing it."""
    whole, thousandths = draw(st.integers(0, 10**9)), draw(st.sampled_from([0, 0, 500, 125, 5, 999]))
    value = Fraction(whole) + Fraction(thousandths, 1000)
    signed = draw(st.sampled_from(["", "-"]))
    value = -value if signed else value
    return value, draw(ways(abs(value), bool(signed))), draw(ways(abs(value), bool(signed)))


@st.composite
def ways(draw: st.DrawFn, value: Fraction, negative: bool) -> str:
    """Draw a way of writing a value."""
    whole, rest = divmod(value, 1)
    digits, tail = str(whole), "" if not rest else f"{Decimal(rest.numerator) / Decimal(rest.denominator)}"[1:]
    forms = [digits + tail, f"{digits}{tail or '.'}0", f"{int(value * 1000)}e-3", f"{int(value * 1000)}×10⁻³"]
    forms += [f"{value.numerator}/{value.denominator}", f"\\frac{{{value.numerator}}}{{{value.denominator}}}"]
    if len(digits) > 3:
        forms += [grouped(digits, sign) + tail for sign in (",", " ", "\u00a0", "\u202f", "'", "’", "_", "{,}")]
        forms += [grouped(digits, ",", indian=True) + tail]
    if rest and whole:
        forms += [f"{whole} {rest}", f"{whole}\\frac{{{rest.numerator}}}{{{rest.denominator}}}"]
    if rest and not whole:
        forms += [tail]
    form = draw(st.sampled_from(forms))
    form = form.translate(str.maketrans("0123456789", draw(DIGITS))) if "frac" not in form else form
    signs = ["-", "−", "–", "-$", "$-", "-€ "] if negative and value else ["", "+", "$", "€ "]
    return draw(st.sampled_from(WRAPS)).format(draw(st.sampled_from(signs)) + form)


@settings(max_examples=300, deadline=None)
@given(numbers())
def test_every_form_of_a_value_is_right_for_every_other(drawn: tuple[Fraction, str, str]) -> None:
    value, gold, said = drawn
    assert extract_number(gold) == written(value)
    assert numeric([gold], said).value == numeric([gold], gold).value == 1.0


@settings(max_examples=300, deadline=None)
@given(numbers(), numbers())
def test_no_form_of_a_value_is_right_for_another_value(
    drawn: tuple[Fraction, str, str], other: tuple[Fraction, str, str]
) -> None:
    assert numeric([drawn[1]], other[1]).value == float(drawn[0] == other[0])


PIECES = st.sampled_from(
    [
        *"0123456789.,:'_-+*/^%$€()[]{}\\ \n=<>xe#½²⁶",
        "\\frac{",
        "\\boxed{",
        "####",
        "answer is ",
        " to ",
        " and ",
        "million",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=30).map("".join))
def test_what_matches_itself_is_right_and_all_else_is_refused(text: str) -> None:
    judged = numeric([text], text)
    assert judged.value == 1.0 or (judged.value is None and judged.reason)


@given(st.text() | st.lists(PIECES, max_size=60).map("".join))
def test_any_text_has_forms_that_stand_in_it(text: str) -> None:
    found = find_forms(text)
    ends = [0, *(edge for form in found.found for edge in (form.start, form.end)), len(found.plain)]
    assert ends == sorted(ends)


def test_a_long_text_is_read_at_its_end_and_not_in_the_middle_of_a_number() -> None:
    assert extract_number("7 " + "word " * SEARCHED_CHARACTERS + "8") == "8"
    assert extract_number("one: 12345" + " ." * (SEARCHED_CHARACTERS // 2 - 1)) == ""
    assert extract_number("1\n" * SEARCHED_CHARACTERS) == "1"
    assert extract_number("(" * 50_000 + "5") == "5"
    assert find_forms("10^" * 1000 + "9").found[-1].value is None
