"""Which letter a text gives: tables of wordings, and properties that no wording breaks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_arena.tasks.benchmarks.forms import lettered, options_of
from peft_arena.tasks.letter_answers import SHORT_CHARACTERS, given_letter
from peft_arena.tasks.letter_text import LETTERS

DRUGS = ("aspirin", "ibuprofen", "codeine", "morphine")
GIVEN = {
    "": [
        "The answer is none of A, B, C, D", "It's not clear whether A or B", "All of the above",
        "A and D are both correct.", "The answer is A/B.", "A, then B", "A → B", "Answer: A, B", "A vs B",
        "c is correct", "Правильный ответ: Б", "The answer is I.", "\\boxed{A, B}", "A is not the answer.",
        "It isn't D.", "B beats A", "A? B? I'm not sure.", "(A) or (B)", "A | B", "The answer is C or D.",
        "The answer is C, possibly D.", "The answer can't be D.", "not only A but also B",
        "Every option except D is wrong.", "aspirin or ibuprofen", "not ibuprofen", "I don't know", "A or B",
        "E", "Because", "I'd say nothing", "", "a, b, c, d", "A, B, C, D", "A B C D", "either A or B",
        "The answer is either A or B", "A and B", "A/B", "The answer is A and B",
        "The answer is A. The answer is B.", "A is worse than B", "The wrong answer is A", "choice a or b",
        "A. dog\nB. cat\nC. cow\nD. hen", "Vitamin C", "The answer is vitamin C", "caused by C. difficile",
        "T cells and B cells", "I", "A, B and C are wrong.", "So the answer is not A", "The answer isn't A",
        "I would not pick B.", "Option A says x. Option B says y.", "The answer is A vitamin", "Not A",
        "Not A or B", "The answer is between A and B", "B or maybe C", "The answer is B, C", "Answer: ABCD",
        "both A and C are right", "neither", "A is out, B is out, so it's C or D", "B is less likely than A",
        "There is no correct answer", "the answer is D. ibuprofen", "Anything but A.", "All but A",
        "Everything except A",
        "The answer is A if you believe X, otherwise B.", "A: B", "A. B.", "The answer is A. B", "Answer: A (or B)",
        "The answer is A unless B.", "The answer is A. Or is it B?", "The answer is A for adults and B for children.",
        "A (20%) B (80%)", "I was going to say A until I saw D.", "The answer is A, though D is better.",
        "The answer would be A if the patient were younger; since not, B.", "No one would pick A.",
        "Some say the answer is A. I say B.", "(A) False (B) True",
    ],
    "A": [
        "It's definitely not C. My answer is A.", "(A) aspirin", "A. aspirin", "a) aspirin", "[A]", "{A}",
        "ANSWER: A", "THE ANSWER IS A", "Thus the correct option is A", "vitamin B12 deficiency, so A", "A.",
        "A is the answer.", "Not D but rather A", "The best answer would be (A)",
        "The answer is A because dogs run, and B does not", "A is correct, not B", "A\n\nthe dog, not B",
        "A. The dog", "A is better than B", "option a", "A: dog", "A", "a", "The answer is a.", "I pick A",
        "It's A", "A because dogs run", "A since it", "the correct answer is aspirin because it is cheap",
    ],
    "B": [
        "I'd go with B over A.", "The answer: option (b)", "The answer must be B", "The answer should be (B)",
        "So, B.", "Possible answers are A and B. The answer is B.", "Options: A, B, C, D. Answer: B",
        "I initially chose A. On reflection, B is correct.", "B (not C)", "B, definitely not A", "just B",
        "je pense que c'est B", "Die richtige Antwort ist B", "Правильный ответ - B", "選B", "B选项正确",
        "A选项错误\uff0c所以选B", "A不对\uff0cB对", "I am sure it's B", "Prof. C. Lee says A is wrong and B is right",
        "Vitamin D is needed. Answer: B", "Type A blood. B.", "A man walks in. Answer is B",
        "B is an A-level subject, so B", "The answer is\n\nB", "The answer is:\n**B**", "**B) ibuprofen**",
        "B)", "B]", "(B", "<B>", "\\mathbf{B}", "\\boxed{\\text{B}}", "\\boxed{b}", "\\boxed{(B) ibuprofen}",
        "\\boxed{ibuprofen}", "\\fbox{B}", 'The answer is "B".', "The answer is 'b'.", "b", "B\n",
        "Answer:\n\nB", "I reject A in favor of B.", "Between A and B, I choose B", "A, no B", "A. No, B.",
        "A - wait, B", "A? Hmm, B.", "The correct answer isn't A, it's B", "ibuprofen",
        'The answer is "ibuprofen".', "The correct answer is B) ibuprofen", "Answer: ibuprofen",
        "The correct answer is **ibuprofen**", "b. ibuprofen", "答案是B", "Option B", "B", "Not A, but B.",
        "Answer: A. Actually, B.", "Actually, B", "I first thought A, but it's B.", "B rather than A",
        "B, not A", "B instead of C", "It can't be A. It must be B.", "A (wrong), B (right)", "A? No. B? Yes.",
        "Réponse : B", "La réponse est B", "正确答案是B", "答案是 (B)\uff0c不是A", "应该选择B", "答案不是A\uff0c而是B",
        "Ответ: B",
        "정답은 B", "答えはBです", "The wrong option is A, so the answer is B", "the answer is not a but b.",
        "the answer is b", "(B) ibuprofen", "B) ibuprofen", "B: ibuprofen", "B - ibuprofen",
        "B\nA is wrong because", "B, because A is too slow", "\u201cB\u201d", "'B'", "__B__", "`B`",
        "<b>B</b>", "$\\text{B}$", "\\textbf{B}", "\uff22", "\uff08B\uff09", "The answer is (b).", "B.", "B!",
        "B?", "All of them are wrong except B.", "B is not wrong.", "Is it A? No, it's B.", "Answer B",
        "Answer is B", "The correct choice: B", "<think>A or B</think>B", "Probably B",
        "The second option, B, is right.",
        "The answer is B, not C, because A is slow.",
        "Answer: B\n\nA is incorrect as it is small. C is incorrect too.", "Answer (B)", "Answer = B", "=> B",
        "-> B", "The answer is not aspirin but ibuprofen", "It is A which I reject; B.", "A or B? B.", "~~A~~ B",
        "The answer is B. Note that A is a common distractor.", "The answer is B because a car moves.",
        "The answer is B. Unlike A, it helps.", "The answer is B (A, C and D are wrong).",
        "The answer is B, although A is plausible.",
    ],
    "C": [
        "A would be the answer if..., but it's C",
        "Option C is correct because options A and B are too small.",
        "We can eliminate B and D. Between A and C, C is better.",
        "We can eliminate B and D. Between A and C, the answer must be C.",
        "A is a distractor; B is too; C is the answer", "The answer is definitely C!", "ANSWER IS C",
        "answer - C", "Answer → C", "Final Answer: The final answer is (C). I hope it is correct.",
        "Clearly, the answer is neither A nor B; it's C.", "I'd say A. Hmm, on second thought, C.",
        "C rather than D", "The answer is C, as A, B and D are wrong.",
        "The answer is C because A and B are false", "C. A and B are wrong.", "C\n\nA: wrong", "Only C works.",
        "Only C", "maybe C?", "Is the answer C?", "I think the answer might be C", "the letter is c",
        "letter: c", "choice (c)", "La risposta corretta è C", "正解はCです", "排除A\uff0c选C", "Mr. B. Jones chose C",
        "hepatitis B virus; the answer is C", "The answer is C (not D).", "The answer is C and not D.",
        "the most likely diagnosis is C", "答案\uff1aC", "Answer:C", "\\boxed{C}", " (C) because",
        "A and B are close, but the answer is: (C)", "(c)", "c)", "B... no, wait, C",
        "The answer is B. Actually, C.", "I think it's C", "A is tempting, but C.",
        "A: wrong\nB: wrong\nC: right\nD: wrong", "Antwort: C", "Die Antwort ist C", "选C",
        "Answer: c. codeine", "A. dog\nB. cat\nC. cow\nD. hen\nAnswer: C", "Neither A nor B, so C",
        "Eliminate A and B. C remains.", "My answer: C", "It could be A or B, however C fits best.",
        "The best answer is C, although B is plausible.", "C. None of the above",
        "If A were true then B, so C", "My friend says A, but I think C.", "Cross out A, B; pick C",
    ],
    "D": [
        "Although A seems right, the answer is D.", "While B is common, D is the best choice.",
        "Not (A), not (B), not (C): (D).", "Correct answer: D) morphine", "The correct answer is option D.",
        "Hence (D)", "D because neither A nor B nor C applies", "A resposta é D", "E. coli is the cause, so D",
        "A major factor is D", "A isn't the answer, D is.", "A is not correct. D is.", "A is not correct. D.",
        "My answer would be D", "I'll answer D", "I answer D", "I vote D", "D it is", "d.", "D,",
        "Let me think. A is plausible. B is plausible. So D.", "Answer choice D is correct.",
        "Answer choice D", "The choice is D", "Option D is the only correct option.", "d", "Answer: **d**",
        "A dog runs, so D", "A is incorrect. B is incorrect. C is incorrect. D is correct.",
        "La respuesta es D", "I choose option D.", "I wouldn't choose A; I'd go with D.",
        "The final answer is $\\boxed{\\text{D}}$", "D is the correct answer", "D is the answer", "Correct: D",
        "John A. Smith says D", "Considering A... rejecting A... choosing D",
        "Therefore, the correct answer is D", "I was torn between A and D but D wins", "It is D.",
        "The answer is D: morphine", "the answer is D. morphine", "morphine", "Morphine.", "A looks right but D is.",
        "A looks right at first glance, however D.", "A was correct in 2010. Now D.", "The answer is A, er, D.",
        "A is correct only if fasting; D is always correct.", "My answer was A. My answer is now D.",
        "The answer is A. Just kidding, D.", "The answer is A. EDIT: D", "A's wrong. D's right.", "ans - d",
    ],
}  # fmt: skip
"""Letter to texts that give it; texts under the empty letter give none."""


@pytest.mark.parametrize(("letter", "text"), [(letter, text) for letter, texts in GIVEN.items() for text in texts])
def test_the_letter_of_a_text(letter: str, text: str) -> None:
    assert given_letter(text, 4, DRUGS, first=True) == letter
    assert given_letter(text, 4, DRUGS) == letter


def test_letters_beyond_the_options_are_no_answer() -> None:
    assert given_letter("The answer is C", 2) == ""
    assert given_letter("The answer is J", 10) == "J"


def test_an_option_is_known_by_its_text_where_texts_are_given() -> None:
    assert given_letter("The answer is codeine.", 4) == ""
    assert given_letter("The answer is codeine.", 4, DRUGS) == "C"
    assert given_letter("The answer is D. ibuprofen", 4, DRUGS) == ""  # label and text disagree
    assert given_letter("The answer is vitamin C.", 3, ("iron", "zinc", "vitamin C")) == "C"
    assert given_letter("The answer is vitamin C.", 3) == ""
    assert given_letter("same", 3, ("same", "Same", "other")) == ""
    assert given_letter("The answer is no.", 2, ("yes", "no")) == "B"
    assert given_letter("The answer is no longer clear", 2, ("yes", "no")) == ""


def test_in_a_long_text_only_what_is_said_to_be_the_answer_counts() -> None:
    long = "Patients with this complaint often improve. " * (SHORT_CHARACTERS // 40)
    assert given_letter(f"{long} So C fits.", 4) == ""
    assert given_letter(f"{long} A is wrong. The answer is C.", 4) == "C"
    assert given_letter(f"{long} The answer is A. Wait, actually the answer is C.", 4) == "C"
    assert given_letter(f"<think>{long} The answer is A</think>C", 4) == "C"


def test_a_long_text_is_read_at_one_end() -> None:
    assert given_letter("B\nQuestion: Which?\nAnswer: C", 4, first=True) == "B"  # it went on with a question of its own
    filler = "word " * 4000
    assert given_letter(f"B\n{filler}", 4, first=True) == "B"
    assert given_letter(f"{filler}\nThe answer is B.", 4) == "B"


def test_options_are_found_in_the_question_that_shows_them() -> None:
    options = ("two\nlines", "A. dot", "", "d")
    assert options_of(lettered("Which?\nA. not this", options), 4) == options
    assert options_of("no options", 2) == ()


SAYS = st.sampled_from(
    [
        "{0}",
        "({0})",
        "**{0}**",
        "{0}.",
        "[{0}]",
        "\\boxed{{{0}}}",
        "The answer is {0}.",
        "Answer: {0}",
        "answer is ({0})",
        "So, {0}.",
        "I pick {0}",
        "Not {1} but {0}.",
        "The answer is not {1}, it is {0}.",
        "{1} is wrong; {0} is right.",
        "We rule out {1}, leaving {0}",
        "{1}... no, wait, {0}",
        "Both {1} and {2} are close, but the best option is {0}.",
        "答案是{0}",
        "答案\uff1a{0}",
        "Réponse : {0}",
        "Die Antwort ist {0}.",
        "Actually, {0}",
        "{0}, not {1}",
        "{0} rather than {2}",
        "The correct choice is {0}, since {1} and {2} are incorrect.",
        "Option {0}",
        "I considered {1}, but it is wrong. Final answer: {0}",
        "Neither {1} nor {2}, so {0}.",
        "{0} is the answer",
    ]
)
"""Ways to give the first letter of three."""
LISTS = st.sampled_from(
    [
        "{0} and {1}",
        "{0} or {1}",
        "{0}, {1}",
        "{0}/{1}",
        "{0} {1}",
        "({0}) ({1})",
        "{0}\n{1}",
        "either {0} or {1}",
        "The answer is {0} or {1}.",
        "The answer is {0} and {1}",
        "Answer: {0}, {1}",
        "both {0} and {1}",
        "{0} & {1}",
        "It could be {0} or {1}",
        "{0}, {1}, {2}",
        "\\boxed{{{0}, {1}}}",
        "{0}. dog\n{1}. cat",
        "maybe {0}, maybe {1}",
        "neither {0} nor {1}",
        "I am torn between {0} and {1}",
        "The answer is {0}. The answer is {1}.",
        "not {0} or {1}",
    ]
)
"""Texts that name letters and decide for none."""
THREE = st.permutations(LETTERS[:4]).map(lambda letters: letters[:3])


@settings(max_examples=300, deadline=None)
@given(SAYS, THREE)
def test_saying_it_otherwise_keeps_the_letter(way: str, letters: list[str]) -> None:
    assert given_letter(way.format(*letters), 4) == given_letter(way.format(*letters), 4, first=True) == letters[0]


@settings(max_examples=300, deadline=None)
@given(LISTS, THREE)
def test_a_list_without_a_verdict_gives_no_letter(way: str, letters: list[str]) -> None:
    assert given_letter(way.format(*letters), 4) == given_letter(way.format(*letters), 4, first=True) == ""


@given(
    st.text()
    | st.lists(st.sampled_from([*"ABCDabI.,:()\n*_", " is ", " not ", "answer", " but ", " and "])).map("".join)
)
def test_any_text_gives_a_letter_of_the_options_or_none(text: str) -> None:
    for first in (True, False):
        assert given_letter(text, 3, DRUGS[:3], first=first) in ("", "A", "B", "C")
