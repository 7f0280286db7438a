"""The grader: pairs that are equal, pairs that are not, where the answer is found, and text written to break it."""

import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from fractions import Fraction
from pathlib import Path

import pytest

import reward
from reward import GRADERS, check_grader, exact_equal, extract_answer, grade, normalise, parse_number

EQUAL = [
    # integers and decimals
    ("5", "5"), (" 5 ", "5"), ("+5", "5"), ("007", "7"), ("-0", "0"), ("5.0", "5"), ("5.", "5"), ("5 .", "5"), (".5", "0.50"),
    ("-3", "- 3"), ("\u22123", "-3"), ("{n}".format(n="9" * 100), "9" * 100 + ".0"),
    # thousands
    ("1,234,567", "1234567"), ("1{,}234", "1234"), ("1\\,234", "1234"), ("1,\\!234", "1234"), ("-12,345.50", "-12345.5"),
    ("\\$1,234", "1234"), ("1,234.", "1234"),
    # fractions
    ("1/2", "0.5"), ("2/4", "1/2"), ("1 / 2", "1/2"), ("\\frac{1}{2}", "0.5"), ("\\dfrac{1}{2}", "\\tfrac{2}{4}"),
    ("\\frac12", "1/2"), ("\\frac 1 2", "1/2"), ("\\frac1{2}", "1/2"), ("\\frac{1}2", "1/2"), ("\\frac { 1 } { 2 }", "1/2"),
    ("-\\frac{3}{4}", "\\frac{-3}{4}"), ("\\frac{3}{-4}", "-0.75"), ("-\\frac{-3}{4}", "0.75"), ("\\frac{1.5}{3}", "1/2"),
    ("1 1/2", "3/2"), ("1\\frac{1}{2}", "1.5"), ("-1 \\frac12", "-3/2"), ("1\\ 1/2", "1.5"), ("6/3", "2"),
    # percentages
    ("50%", "0.5"), ("50\\%", "1/2"), ("50 \\%", "50%"), ("12.5\\%", "\\frac{1}{8}"), ("\\frac{1}{2}\\%", "0.005"),
    # type-setting
    ("$5$", "5"), ("\\(5\\)", "5"), ("\\[ 5 \\]", "5"), ("\\text{5}", "5"), ("\\textbf{\\text{ 5 }}", "5"), ("\\!5\\,", "5"),
    ("\\left(1,2\\right)", "(1, 2)"), ("2 \\pi", "2\\pi"), ("x + 1", "x+1"), ("\\dfrac{\\sqrt3}{2}", "\\frac{\\sqrt{3}}{2}"),
    ("5\\mathrm{cm}", "5cm"), ("5~\\text{cm}", "5 cm"), ("\\displaystyle 5", "5"), ("(5)", "5"), ("{5}", "5"),
    ("12\\pi", "12\u03c0"), ("2\u03c0r", "2\\pi r"), ("x^{2}+1", "x^2+1"), ("a_{1}", "a_1"),
    ("\\pm 3", "\\pm3"), ("2\u00d73", "2\\times 3"), ("2 \\times 10^{3}", "2\\times10^3"), ("a\\quad b", "a b"),
    ("y = 2x + 1", "y=2x+1"),
    ("113.0", "113"), ("4 \\frac{1}{2}", "4.5"), ("\\frac { 20 } { 3 }", "20/3"), ("\\text{ 5}", "5"), ("3 : 4", "3:4"),
    ("$ 5 $", "5"),
    # roots
    ("\\sqrt{3}", "\\sqrt 3"), ("2\\sqrt{3}", "2 \\sqrt { 3 }"), ("\\sqrt{12}", "\u221a12"), ("2\u221a{3}", "2\\sqrt3"),
    ("6 \\sqrt { 3 }", "6\\sqrt{3}"),
    ("\\dfrac{5\\sqrt{3}}{3}", "\\frac{5 \\sqrt{3}}{3}"), ("\\sqrt[3]{2}", "\\sqrt[3]{ 2 }"), ("-\\sqrt{2}", "-\u221a2"),
    ("\\sqrt{x+1}", "\\sqrt{x + 1}"),
    # degrees and other units
    ("30^\\circ", "30^{\\circ}"), ("30\u00b0", "30^\\circ"), ("30\\degree", "30\u00b0"),
    ("30.0^{\\circ}", "30.0 ^ \\circ"), ("25\\text{cm}^2", "25cm^{2}"),
    ("25\\text{ cm}^2", "25 cm^{2}"), ("12 \\text{cm}^2", "12cm^{2}"), ("12cm\u00b2", "12 \\mathrm{cm}^2"), ("5 cm", "5cm"), ("2 x", "2x"),
    ("10\\ \\mathrm{m/s}", "10 m/s"), ("5\\,\\text{cm}", "5 cm"),
    ("20\u00b0C", "20^\\circ C"), ("5\\text{ cm}", "5~cm"),
    # intervals, inequalities, sets
    ("(-\\infty,2]", "(-\\infty, 2]"), ("(0,\u221e)", "(0, \\infty)"), ("(-\\infty,\\frac12)", "(-\\infty,0.5)"),
    ("\\left[0,1\\right)", "[0, 1)"),
    ("[1,2]\\cup[3,4]", "[1, 2] \\cup [3, 4]"), ("x>2", "x > 2"), ("x \\geq 2", "x\\ge2"), ("x\u22642", "x \\leq 2"),
    ("1<x<3", "1 < x < 3"),
    ("\\left\\{1,2\\right\\}", "\\{1, 2\\}"), ("\\{ 0.5 , 2 \\}", "\\{\\frac{1}{2},2\\}"),
    ("\\left(\\frac{1}{2},3\\right)", "(0.5, 3)"),
    # lists, tuples, equations: numbers inside them are numbers too
    ("1,2,3", "1, 2, 3"), ("(0.5, 1)", "(\\frac12,1)"), ("x = 5.0", "x=5"), ("\\{1, 0.5\\}", "\\{1,1/2\\}"), ("[0, 1)", "[0,1)"),
    # letters and words
    ("(B)", "B"), ("B.", "B"), ("[B]", "B"), ("\\text{(B)}", "B"), ("b", "B"), ("B)", "(b)"), ("\\mathbf{B}.", "B"),
    ("yes", "Yes"), ("\\text{No}", "no"), ("Not  enough information", "not enough information"), ("{B}", "B"),
    ("$\\mathrm{(b)}$", "B"), ("A, C", "A,C"),
]  # fmt: skip
UNEQUAL = [
    ("5", "6"), ("5", "-5"), ("5", "55"), ("", "0"), ("0.3333", "1/3"), ("1/0", "0"), ("0/0", "1/0"),
    ("1 1/2", "11/2"), ("1 234", "1234"), ("1. 5", "1.5"), ("1-1/2", "1.5"), ("2 3", "23"), ("5\\,3", "53"),
    ("1,23", "123"), ("1,2", "12"), ("1,2,3", "123"), ("(1,234)", "1234"), ("1, 234", "1234"), ("0,123", "123"), ("1,2345", "12345"),
    ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2)", "(1,2,3)"), ("\\frac{1}{2}5", "1/25"),
    ("\\frac{1}{2}", "2"), ("\\frac{x+1}{2}", "x+1/2"), ("x^2", "x2"), ("2\u00b2", "22"), ("\u0665", "5"), ("1e3", "1000"), ("inf", "nan"),
    ("3 or 4", "4"), ("3,4", "4"), ("A, B", "A"), ("A", "B"), ("AB", "A"), ("(A)(B)", "B"), ("yes no", "yes"), ("not yes", "yes"),
    ("None", ""), ("-\\frac{1}{2}", "\\frac{1}{2}"), ("3.14", "\\pi"), ("i", "1"), ("1\\;000", "1000"),
    ("7", "\\sqrt{7}"), ("\\frac{2}{3}", "\\frac{3}{2}"),
    # roots, units, angles
    ("\\sqrt{3}", "\\sqrt{2}"), ("\\sqrt{12}", "\\sqrt{1}2"), ("\\sqrt[3]{2}", "\\sqrt{2}"), ("2\\sqrt{3}", "3\\sqrt{2}"),
    ("\\sqrt{3}", "1.732"),
    ("5 cm", "6 cm"), ("30^\\circ", "60^\\circ"), ("90^\\circ", "\\frac{\\pi}{2}"), ("\\angle A", "\\angle B"),
    ("12\\pi", "12"), ("2\\pi", "\\pi^2"),
    # intervals, inequalities, sets
    ("(0,1)", "[0,1]"), ("[0,1)", "(0,1]"), ("(-\\infty,2]", "(-\\infty,2)"), ("x>2", "x<2"), ("x\\ge 2", "x>2"),
    ("\\{1,2\\}", "\\{1,2,3\\}"), ("\\pm 3", "3"),
    # options
    ("C", "D"), ("ABC", "ABD"), ("B. 5", "B"), ("Option B", "B"), ("\\text{True}", "False"),
    ("\\text{isosceles}", "isosceles triangle"),
]  # fmt: skip
# Where the graders differ, equal to math-verify alone: what is mathematically equal, then what it takes for equal as well.
GENEROUS = [
    ("2\\sqrt{3}", "\\sqrt{12}"), ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"), ("x^2-1", "(x-1)(x+1)"), ("2+3", "5"),
    ("\\frac{\\sqrt{4}}{2}", "1"),
    ("\\sqrt{3}/2", "\\frac{\\sqrt{3}}{2}"), ("2\\cdot\\sqrt{3}", "2\\sqrt{3}"), ("x^2+1", "1+x^2"),
    ("2\\times 10^3", "2000"), ("\\log_2 8", "3"),
    ("1/2/3", "1/6"), ("x>2", "2<x"), ("[1,2]\\cup[3,4]", "[3,4]\\cup[1,2]"), ("1:2", "2:4"),
    ("\\pi/2", "\\frac{\\pi}{2}"), ("8 \\sqrt{2}", "\\sqrt{128}"),
    ("x=5", "5"), ("5", "x=5"), ("\\angle ABC = 30^\\circ", "30"), ("f(x)=3", "3"), ("x_1=1, x_2=2", "1,2"), ("5 cm", "5"), ("5\\text{ cm}^2", "5"),
    ("30^\\circ", "30"), ("30", "30^\\circ"), ("2,1", "1,2"), ("1:2", "2:4"), ("\\{1,2\\}", "1,2"), ("2A", "2a"), ("\\Delta", "\\delta"),
    ("\\frac125", "1/25"), ("0.30000000000000004", "0.3"), ("0.3333333", "1/3"), ("bc+ab", "ab+bc"), ("\\sum_{n=1}^{5} n", "15"), ("AC and BD", "BD and AC"),
    ("1+2x=y", "y=2x+1"), ("\\frac{\\sqrt{4}}{4} \\text{ apples}", "\\frac12 \\text{ apples}"),
]  # fmt: skip
# What the math-verify package overlooks or takes for equal, and we do not.
EXPLOITS = [
    # chains: of all that was tried, the last would count
    ("4=3", "3"), ("1=2=3", "3"), ("x=4=3", "3"), ("x=y=3", "3"), ("x=4=3", "x=3"), ("2+2=3", "3"), ("((=(=3", "3"), ("1=1,2=2", "1,2"),
    ("3 \\approx 4", "3"), ("3 \u2248 4", "3"), ("4 \\equiv 3", "3"), ("4 \u2261 3", "3"), ("3 \\mod 4", "3"), ("x \\not= 3", "3"), ("x!=3", "3"),
    # a base, a percent sign, quotation marks
    ("3_4", "3"), ("3_{4}", "3"), ("(3)_4", "3"), ("3_\\alpha", "3"), ("3\\%", "3"), ("3", "3\\%"), ("50%", "50"), ("50", "50\\%"), ("3'", "3"),
    # words and units of another kind
    ("3 \\text{ apples}", "3"), ("3 apples", "3"), ("3", "3 \\text{ apples}"), ("3 \\text{ pears}", "3 \\text{ apples}"), ("3rd", "3"), ("3\\mathrm{th}", "3"),
    ("5 cm", "5 mm"), ("5", "5 cm"), ("5 cm", "5 \\text{cm}^2"), ("3 m", "3m^2"), ("3", "3m"), ("3x", "3"),
    ("7:30 pm", "7:30"), ("7:30", "7:30 pm"), ("0:30 am", "0:30 pm"), ("blue and red", "red and blue"), ("red, blue", "blue, red"),
    ("3 \\text{ because } 2+1=3", "3"), ("3 \\text{ or } 4 \\text{ apples}", "3"), ("3 percent", "3"), ("infinity", "\\infty"),
    # text that is set as a formula, or not at all
    ("((( \\(4\\) x", "4"), ("((( \\[4\\] x", "4"), ("((( [4] x", "4"), ("((( \\frac{1}{2} x", "\\frac12"), ("final answer is \\(4\\) I hope ((", "4"),
    ("3\\ldots", "3"), ("\\phantom{3}", "3"), ("3\\vspace{4}", "3"), ("\\pi r", "\\pir"), ("3 or 4", "3"), ("3,4", "3"), ("\\pm 3", "3"),
]  # fmt: skip


@pytest.mark.parametrize("answer, truth", EQUAL)
def test_equal_pairs_in_both_directions(answer, truth):
    assert exact_equal(answer, truth) and exact_equal(truth, answer)
    assert grade(f"so \\boxed{{{answer}}}", truth) == 1.0


@pytest.mark.parametrize("answer, truth", UNEQUAL + GENEROUS + EXPLOITS)
def test_unequal_pairs_in_both_directions(answer, truth):
    assert not exact_equal(answer, truth) and not exact_equal(truth, answer)
    assert grade(f"so \\boxed{{{answer}}}", truth) == 0.0


@pytest.mark.parametrize("text", sorted({text for pair in EQUAL for text in pair}))
def test_normalising_once_is_enough(text):
    assert normalise(normalise(text)) == normalise(text)


def test_numbers_are_exact_fractions():
    assert parse_number("-1\\frac{1}{2}") == Fraction(-3, 2)
    assert parse_number("12.5%") == Fraction(1, 8)
    assert parse_number("0.1") == Fraction(1, 10)
    assert parse_number("1/0") is None and parse_number("1e5") is None and parse_number("x") is None


@pytest.mark.parametrize(
    "text, content",
    [
        ("\\boxed{5}", "5"), ("a \\boxed{3} b \\boxed{4} c", "4"), ("\\boxed {5}", "5"), ("\\boxed\n{5}", "5"), ("\\boxed{}", ""),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("\\boxed{\\text{a {b} c}}", "\\text{a {b} c}"), ("\\boxed{a\nb}", "a\nb"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"), ("\\boxed{\\}}", "\\}"), ("\\boxed{5\\}", None), ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{3} then \\boxed{4", "3"), ("\\boxed{4 \\boxed{3}", "3"), ("\\boxed{3} \\boxed{4 {", "3"), ("}}} \\boxed{3}", "3"),
        ("{{{ \\boxed{3}", "3"), ("\\boxed{3}}}", "3"), ("\\fbox{5}", None), ("boxed{5}", None), ("\\boxed 5", None), ("\\boxed", None),
        ("\\boxedx{5}", None), ("the answer is 5", None), ("", None), (None, None), (5, None), ("\\", None), ("\\boxed{5}\\", "5"),
    ],
)  # fmt: skip
def test_extract_answer(text, content):
    assert extract_answer(text) == content


@pytest.mark.parametrize("truth", ["5", "\\boxed{5}", "$5$", "$\\boxed{5}$", " 5.0 ", 5])
def test_truth_may_be_wrapped(truth):
    assert grade("\\boxed{5}", truth) == 1.0
    assert grade("\\boxed{6}", truth) == 0.0


def test_only_the_box_counts():
    assert grade("5", "5") == 0.0
    assert grade("\\boxed{5} and then \\boxed{6}", "5") == 0.0
    assert grade("\\boxed{}", "") == 0.0  # an empty answer earns nothing, whatever the truth


HOSTILE = [
    None, "", " ", 5, b"\\boxed{5}", "\\boxed{1/0}", "\\boxed{0/0}", "\\boxed{\\frac{1}{0}}", "\\boxed{9**9**9}", "\\boxed{9^{9^9}}",
    "\\boxed{9^9^9^9}", "\\boxed{10^{10^{10}}}", "\\boxed{((9!)!)!}", "\\boxed{99999999!}",
    "\\boxed{1e999999}", "\\boxed{inf}", "\\boxed{nan}", "\\boxed{-\\infty}", "\\boxed{" + "9" * 100_000 + "}",
    "\\boxed{1/" + "9" * 100_000 + "}", "\\boxed{" + "(" * 200 + "}", "\\boxed{" + "-" * 299 + "1}", "\\boxed{" + "\\text{" * 40 + "}" * 41,
    "\\boxed{\u0665\u0666}", "\\boxed{\u00bd}", "\\boxed{\ud800}", "\ud800\\boxed{\udfff5}", "\\boxed{\x00}", "\\boxed{%}", "\\boxed{.}",
    "\\boxed{,}", "\\boxed{/}", "\\boxed{-}", "\\boxed{\\frac}", "\\boxed{\\frac{}{}}", "\\boxed{\\1}", "\\boxed{\\g<0>}", "\\boxed{()}",
    "\\boxed{__import__('os').abort()}", "\\boxed{exit()}", "\\boxed{$$}", "\\boxed{" * 100_000, "{" * 1_000_000, "}" * 1_000_000,
    "\\" * 1_000_001, "\\boxed" + " " * 1_000_000, "\\boxed{" * 100_000 + "}" * 100_000, "\\boxed{" + " " * 100_000 + "}",
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(HOSTILE)))  # by index: a million braces make a poor test name
def test_hostile_text_scores_zero(index):
    assert grade(HOSTILE[index], "7") == 0.0


def test_overlong_answers_match_only_character_by_character():
    long = "9" * 100_000
    assert grade(f"\\boxed{{{long}}}", long) == 1.0
    assert grade(f"\\boxed{{{long}.0}}", long) == 0.0


PIECES = ["\\boxed{", "\\boxed {", "{", "}", "\\", "\\frac", "\\text{", "1", "23", ".", ",", "/", "-", "%", "$", " ", "(", ")", "[", "]",
          "=", "^", "x", "A", "yes", "\\{", "\\}", "\\,", "\\left", "\n", "\u0663", "\ud800", "e9", "\x00"]  # fmt: skip


def noise(rng):
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(40)))


def test_random_noise_never_raises():
    rng = random.Random(0)
    for _ in range(3000):
        assert grade(rng.choice([noise(rng), f"\\boxed{{{noise(rng)}}}"]), noise(rng)) in {0.0, 1.0}


def test_random_numbers_equal_themselves_in_every_spelling():
    rng = random.Random(0)
    for _ in range(300):
        n = rng.randrange(-10**7, 10**7)
        for spelling in (f"{n:,}", f"{n}.00", f"\\frac{{{3 * n}}}{{3}}", f"{100 * n}\\%", f"${n}$", f"{2 * n}/2"):
            assert exact_equal(spelling, str(n)) and not exact_equal(spelling, str(n + 1))


@pytest.mark.parametrize("call", [check_grader, lambda name: grade("\\boxed{5}", "5", name)])
def test_unknown_grader_names_the_choices(call):
    with pytest.raises(ValueError, match="unknown grader 'exct': choose one of exact, math-verify"):
        call("exct")


@pytest.mark.parametrize("call", [check_grader, lambda name: grade("\\boxed{5}", "5", name)])
def test_missing_math_verify_says_what_to_do(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # makes `import math_verify` raise ImportError
    with pytest.raises(ImportError, match="pip install math-verify or use --grader exact"):
        call("math-verify")
    check_grader("exact")


class TestMathVerify:
    @pytest.fixture(autouse=True)
    def needs_package(self):
        pytest.importorskip("math_verify")

    @pytest.mark.parametrize("answer, truth", EQUAL + GENEROUS)
    def test_equal(self, answer, truth):
        assert grade(f"\\boxed{{{answer}}}", truth, "math-verify") == 1.0

    @pytest.mark.parametrize("answer, truth", [*UNEQUAL, *EXPLOITS, ("$3$ or $4$", "4"), ("((( $4$ x", "5"), ("on", "no"), ("x", "5")])
    def test_unequal(self, answer, truth):
        assert grade(f"\\boxed{{{answer}}}", truth, "math-verify") == 0.0

    @pytest.mark.parametrize("index", range(len(HOSTILE)))
    def test_hostile_text_scores_zero(self, index, monkeypatch):
        monkeypatch.setattr(reward, "TIME_LIMIT", 1)
        assert grade(HOSTILE[index], "7", "math-verify") == 0.0

    def test_random_noise_never_raises(self):
        rng = random.Random(0)
        for _ in range(60):
            assert grade(f"\\boxed{{{noise(rng)}}}", noise(rng), "math-verify") in {0.0, 1.0}

    @pytest.mark.parametrize("answer", ["9^{9^9}", "(9!)!", "\\binom{10^9}{10^8}", "\\sum_{n=1}^{10^9} n^n", "(x+y)^{9999}"])
    def test_huge_expressions_end_in_any_thread(self, answer, monkeypatch):
        """Two threads, each with a hopeless pair between ordinary ones: sympy alone would work for minutes or for ever."""
        monkeypatch.setattr(reward, "TIME_LIMIT", 0.5)
        results, first = {}, {}

        def work(name):
            pairs = [("2\\sqrt{3}", "\\sqrt{12}"), (answer, "7"), ("2\\sqrt{3}", "\\sqrt{12}"), ("x+1", "x+2")]
            results[name] = []
            for a, truth in pairs:
                results[name].append(grade(f"\\boxed{{{a}}}", truth, "math-verify"))
                first.setdefault(name, reward.HELPER.process)

        threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {"a": [1.0, 0.0, 1.0, 0.0], "b": [1.0, 0.0, 1.0, 0.0]}
        assert [process.poll() for process in first.values()] == [-signal.SIGPROF] * 2  # it was the limit, and not a quick "no"

    @pytest.mark.parametrize("deaths, expected", [(1, 1.0), (2, 0.0)])
    def test_a_process_that_dies_before_it_is_asked(self, deaths, expected, monkeypatch):
        """Writing to it fails. Another is asked, once: twice is no accident, and no reason to raise."""
        original, died = reward.helper, []

        def dying():
            process = original()
            if len(died) < deaths:
                died.append(process)
                process.kill()
                process.wait()
            return process

        monkeypatch.setattr(reward, "helper", dying)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert grade("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", "math-verify") == expected
        assert [str(warning.message)[:46] for warning in seen] == ["grader math-verify: its process died twice or "] * (deaths - 1)
        assert grade("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", "math-verify") == 1.0

    def test_a_process_that_dies_while_it_is_asked(self):
        """Killed from outside in the middle of a pair that is right."""
        assert grade("\\boxed{2}", "\\sqrt{4}", "math-verify") == 1.0
        process = reward.HELPER.process
        process.send_signal(signal.SIGSTOP)
        threading.Timer(0.5, process.kill).start()
        assert grade("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", "math-verify") == 1.0

    def test_a_process_that_is_stopped_costs_limited_time(self, monkeypatch):
        monkeypatch.setattr(reward, "CLOCK_LIMIT", 1)
        grade("\\boxed{2}", "\\sqrt{4}", "math-verify")
        reward.HELPER.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        assert grade("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", "math-verify") == 0.0
        assert time.monotonic() - start < 3
        monkeypatch.setattr(reward, "CLOCK_LIMIT", 9)
        assert grade("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", "math-verify") == 1.0

    def test_the_limit_is_one_of_the_clock(self, monkeypatch):
        """A process that gets no processor time would never reach its own limit."""
        assert reward.CLOCK_LIMIT < 10
        monkeypatch.setattr(reward, "CLOCK_LIMIT", 1)
        monkeypatch.setattr(reward, "TIME_LIMIT", 100)
        start = time.monotonic()
        assert grade("\\boxed{9^{9^9}}", "7", "math-verify") == 0.0
        assert 0.9 < time.monotonic() - start < 3 and reward.HELPER.process.poll() == -signal.SIGKILL

    def test_a_machine_that_starts_no_more_processes(self, monkeypatch):
        def full(*_, **__):
            raise BlockingIOError(11, "Resource temporarily unavailable")

        reward.HELPER.process = None
        monkeypatch.setattr(subprocess, "Popen", full)
        with pytest.warns(UserWarning, match="its process died twice or does not start"):
            assert grade("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", "math-verify") == 0.0
        with pytest.warns(UserWarning), pytest.raises(ImportError, match="does not start: python reward.py shows why"):
            check_grader("math-verify")

    def test_a_hundred_deaths_leave_no_open_files(self):
        folder = Path("/proc/self/fd")
        if not folder.exists():
            pytest.skip("/proc is Linux")
        counts = []
        for _ in range(4):
            assert grade("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", "math-verify") == 1.0
            counts.append(len(list(folder.iterdir())))
            for _ in range(25):
                reward.helper().kill()
                reward.HELPER.process.wait()
        assert len(set(counts)) == 1

    def test_an_interrupted_question_leaves_no_late_verdict(self, monkeypatch):
        """Ctrl-C while a pair is compared: its verdict must not be taken for the next one's."""
        old = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                grade("\\boxed{9^{9^9}}", "7", "math-verify")
        finally:
            signal.signal(signal.SIGALRM, old)
        assert grade("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", "math-verify") == 1.0
        assert grade("\\boxed{x+1}", "x+2", "math-verify") == 0.0

    def test_forks_have_processes_of_their_own_and_none_stays(self):
        """A rank and its fork grade at once; then both are killed, the rank in the middle of a hopeless pair."""
        script = """if True:
            import os, reward, signal, threading
            right = lambda: reward.grade("\\\\boxed{2}", "\\\\sqrt{4}", "math-verify")
            wrong = lambda: reward.grade("\\\\boxed{x+1}", "x+2", "math-verify")
            assert right() == 1.0
            child = os.fork()
            assert [(right(), wrong()) for _ in range(20)] == [(1.0, 0.0)] * 20
            if not child:
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            print(reward.HELPER.process.pid, flush=True)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
            reward.grade("\\\\boxed{9^{9^9}}", "7", "math-verify")
        """
        root = Path(reward.__file__).parent
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
        assert done.returncode == -signal.SIGKILL, done.stderr
        status = Path(f"/proc/{int(done.stdout)}/stat")  # where there is no /proc, this can only check the exit code
        for _ in range(300):  # it has TIME_LIMIT seconds of processor time left
            try:
                if status.read_text().rpartition(") ")[2][0] in "ZX":  # over, and nobody collects it
                    break
            except FileNotFoundError:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("the math-verify process outlived the process that asked it")


    def test_a_fork_while_another_thread_grades(self):
        """The thread is not in the child, nor is whatever it held. Both sides go on."""
        script = """if True:
            import os, reward, threading, time
            right = lambda: reward.grade("\\\\boxed{2}", "\\\\sqrt{4}", "math-verify")
            long = threading.Thread(target=reward.grade, args=("\\\\boxed{9^{9^9}}", "7", "math-verify"))
            assert right() == 1.0
            long.start()
            time.sleep(1)
            child = os.fork()
            assert right() == 1.0
            if not child:
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            long.join()
        """
        root = Path(reward.__file__).parent
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=60)
        assert done.returncode == 0, done.stderr


def test_every_grader_takes_the_same_arguments():
    assert list(GRADERS) == ["exact", "math-verify"]
    assert GRADERS["exact"]("1/2", "0.5") is True
