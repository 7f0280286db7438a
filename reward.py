r"""The verifiable reward: 1 if the last \boxed{} of a response equals the true answer, else 0 (paper, section 4).

VPPO leaves the reward alone: no format reward, no partial credit. Whatever else a response says, its box decides.
A policy under training writes anything, and reinforcement finds every hole in a grader, so two rules hold throughout:
no text is ever run as code, and no text raises or stalls a run.

Two graders, chosen by `--grader`:
* `exact` (default, no dependency): numbers as exact fractions, option letters, words, otherwise normalised text.
* `math-verify`: also algebra, "2\sqrt{3}" = "\sqrt{12}", through sympy, in a process of its own (this file as a
  script). `pip install math-verify`.
"""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import warnings
from fractions import Fraction

# A final answer is short. Longer ones must match character by character, which bounds the time of everything below and
# keeps numbers far under Python's limit on converting between int and str (4,300 digits).
MAX_LENGTH = 300
TIME_LIMIT = 3  # processor seconds of math-verify for one answer; an ordinary one takes a hundredth of that
CLOCK_LIMIT = 9  # seconds by the clock that `grade` waits for it at most, its start included
START_LIMIT = 60  # seconds by the clock that `check_grader` waits for it, once: importing sympy from a slow disk takes long
MEMORY_LIMIT = 2 << 30  # bytes of its process: 9^{9^9} alone has 370 million digits


# "\\." swallows escaped characters, so that the braces of \{ and \} are text and not structure, as in TeX.
BRACES = re.compile(r"(\\boxed\s*\{)|\\.|([{}])", re.DOTALL)


def extract_answer(text):
    r"""Content of the last balanced \boxed{...} of a response (paper, section 4).

    Of nested boxes the inner one counts, as it opens last.
    A box that never closes does not count: nobody can say where its answer ends. An earlier box that did close stays the
    answer. A response that is cut off at its token limit keeps what it had finished, and a policy gains nothing by an
    open box, because it needs a right answer in a closed one all the same.
    One pass with a stack: linear for any noise.

    Args: text (str): a response. Anything else, such as None, has no answer.
    Returns: str, possibly empty, or None without a balanced box.
    Errors: none.

    >>> extract_answer(r"First \boxed{3}, no: \boxed{\frac{1}{2}}, or \boxed{4")
    '\\frac{1}{2}'
    """
    if not isinstance(text, str):
        return None
    stack = []  # per open brace: where the content of its box starts, or None for an ordinary brace
    best_start, best_end = -1, -1
    for match in BRACES.finditer(text):
        box, brace = match.groups()
        if box:
            stack.append(match.end())
        elif brace == "{":
            stack.append(None)
        elif brace == "}" and stack:
            start = stack.pop()
            if start is not None and start > best_start:
                best_start, best_end = start, match.start()
    return text[best_start:best_end] if best_start >= 0 else None


SIGNS = {"\u2212": "-", "\u221a": "\\sqrt", "\u03c0": "\\pi ", "\u00b0": "^\\circ ", "\u2264": "\\le ", "\u2265": "\\ge ",
         "\u00d7": "\\times ", "\u221e": "\\infty ", "\u00b2": "^2", "\u00b3": "^3"}  # fmt: skip


def to_latex(text):
    r"""Signs of Unicode as LaTeX.

    >>> to_latex("2√12"), to_latex("30°").rstrip()
    ('2\\sqrt{12}', '30^\\circ')
    """
    return re.sub("\u221a ?([0-9]+)", r"\\sqrt{\1}", text).translate(str.maketrans(SIGNS))


FONTS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")


def without_fonts(text):
    r"""The content of \text{...} and its like in their place.

    >>> without_fonts(r"5 \textbf{\text{cm}}")
    '5 cm'
    """
    while (bare := FONTS.sub(r"\1", text)) != text:  # once per level of nesting
        text = bare
    return text


THOUSANDS = re.compile(r"([+-]?[1-9][0-9]{0,2}(,|\{,\}|\\,)[0-9]{3}(?:\2[0-9]{3})*)((?:\.[0-9]*)?\s*(?:\\?%)?)")
DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"  # [0-9] and not \d, which matches the digits of every script
# sign, whole part of a mixed number, numerator (or the number itself), denominator, percent
NUMBER = re.compile(rf"([+-]?)(?:([0-9]+) )?([+-]?{DECIMAL})(?:/([+-]?{DECIMAL}))?(\\?%)?")


def parse_number(text):
    r"""The exact value of an integer, decimal, fraction, mixed number or percentage, else None.

    Fractions, not floats: 0.1 + 0.2 is 0.3 here, and 0.3333 is not 1/3. There is no exponent form, since a short
    "1e999999" would stand for a million digits.

    >>> parse_number(r"-1\frac{1}{2}"), parse_number("50%"), parse_number("1/0")
    (Fraction(-3, 2), Fraction(1, 2), None)
    """
    # The space sets off the whole part of a mixed number: "1\frac{1}{2}" becomes "1 1/2".
    text = re.sub(r"^([+-]?[0-9]*)\\frac\{([^{}]*)\}\{([^{}]*)\}(\\?%)?$", r"\1 \2/\3\4", text)
    match = NUMBER.fullmatch(re.sub(r"^([+-]?) ", r"\1", text))
    if not match:
        return None
    sign, whole, top, bottom, percent = match.groups()
    if whole and (not bottom or not (top + bottom).isdigit()):
        return None  # "1 234" is not a mixed number
    if bottom and Fraction(bottom) == 0:
        return None
    value = Fraction(whole or 0) + Fraction(top) / Fraction(bottom or 1)
    return value * (-1 if sign == "-" else 1) / (100 if percent else 1)


def normalise(text):
    r"""One spelling for answers that mean the same; two answers are equal if this string is.

    Numbers become exact fractions, also inside tuples and equations: "(0.5, 1)" and "(\frac12,1)" are both "(1/2,1)".
    Decisions where custom differs:
    * "50%" is 0.5 and not 50.
    * "1,234" alone is the number 1234; "1, 234", "(1,234)" and "1,2,3" are lists.
    * Words and lone letters ignore case ("Yes" = "yes", "(B)" = "b."); formulas do not (\Delta is not \delta).
    * Units and "x =" are part of the answer.

    >>> normalise(r"$\text{(B)}$."), normalise(r"1{,}234.50"), normalise(r"x = \dfrac{2}{4}")
    ('b', '2469/2', 'x=1/2')
    """
    text = without_fonts(to_latex(text))
    # Marks that only set type: $, \( \), \[ \], \left, \right, \!
    text = re.sub(r"\\?\$|\\[()\[\]!]|\\(?:left|right|displaystyle)(?![A-Za-z])", "", text).strip()
    if match := THOUSANDS.fullmatch(text):  # before spaces go: they tell "1, 234" from "1,234"
        text = match[1].replace(match[2], "") + match[3]
    text = re.sub(r"\\[,;: ]|~|\\q?quad(?![A-Za-z])|\s+", " ", text)
    # A space means something only between words, numbers ("1 1/2", and "1. 5" is not 1.5) and after a command (\pi r).
    text = re.sub(r" *([^\w\s.]) *", r"\1", re.sub(r" +", " ", text)).strip().removesuffix(".").rstrip()
    text = re.sub(r"(?<=[0-9]) (?=[A-Za-z])", "", text)  # "5 cm" and "5cm"
    # \dfrac and \tfrac only differ in size; \frac12 and \sqrt3 leave out braces.
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac ?([0-9])(?= ?[0-9{])", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{[^{}]*\}|\\sqrt) ?([0-9])", r"\1{\2}", text)
    # x^{2} and x^2, \geq and \ge, \pm 3 and \pm3, \degree and ^\circ are the same.
    text = re.sub(r"\\([gl]e)q(?![A-Za-z])", r"\\\1", text.replace("\\degree", "^\\circ"))
    text = re.sub(r"([\^_])\{(\w|\\circ)\}", r"\1\2", re.sub(r"(\\[A-Za-z]+) (?=[0-9])", r"\1", text))
    # Brackets around one number or one letter carry nothing: "(5)", "{5}", "[B]", "B)".
    if match := re.fullmatch(r"\(([^()\[\],;=]*)\)|\{([^{}]*)\}|[(\[]?([A-Za-z])[)\]]?", text):
        text = match[1] or match[2] or match[3] or ""
    if text.replace(" ", "").isalpha():
        return text.casefold()
    pieces = re.split(r"(\\[{}]|[()\[\],;=])", text)
    values = [parse_number(piece) for piece in pieces]
    return "".join(piece if value is None else str(value) for piece, value in zip(pieces, values))


def exact_equal(answer, truth):
    """Whether two answers have the same normal form. An empty answer equals nothing.

    >>> exact_equal("0.75", "3/4"), exact_equal("0.33", "1/3"), exact_equal("", "")
    (True, False, False)
    """
    normal = normalise(answer)
    return normal != "" and normal == normalise(truth)


# ---------------------------------------------------------------------------------------------------------------------
# math-verify
# ---------------------------------------------------------------------------------------------------------------------
# The commands whose meaning sympy knows or does not need. Of any other it drops what it likes: "3 \approx 4" would be 3.
LETTERS = (
    "angle triangle left right alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau "
    "phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega".split()
)
ALGEBRA = LETTERS + (
    "frac dfrac tfrac cfrac sqrt cdot times div pm mp infty le leq ge geq lt gt cup cap in circ degree log ln lg exp sin cos tan "
    "cot sec csc arcsin arccos arctan sinh cosh tanh binom sum prod int lim max min gcd emptyset varnothing quad qquad displaystyle".split()
)
EQUALS = r"(?<![<>])="
# The name of a variable and its equals sign, in front of the whole answer or of a part of a list: x=, f(x)=, \angle ABC=, x_1=
NAME = re.compile(rf"(^|[,;])(?:\\(?:{'|'.join(LETTERS)})(?![A-Za-z])|[A-Za-z()\s]|_\w|_\{{\w+\}})+{EQUALS}")
# A command, a word, a character beyond ASCII, a percent or quotation mark, the index of a number (3_4: 3 in base 4)
ASIDE = re.compile(r"\\([A-Za-z]+)|([A-Za-z]+)|([^\x00-\x7f]|[%'\"]|(?<=[0-9)}])\s*_)")
UNIT = re.compile(
    r"(?<=[0-9)} ])(?:square )?(?:[mcdk]?m|in|inch(?:es)?|ft|feet|yards?|miles?|[mk]?g|m?l|s|sec(?:onds?)?|min(?:utes?)?|"
    r"h|hours?|degrees?|(?:(?:centi|kilo)?met(?:er|re)s?)|units?)(?:\^[23]|\^\{[23]\})?\s*$"
)


def asides(text):
    r"""What sympy would pass over or take for a product of letters, in order: words, unknown commands, "%", an index ...

    >>> asides(r"x = 3\%"), asides(r"\frac{1}{2} \approx 0.5 apples"), asides("11_2")
    (['%'], ['approx', 'apples'], ['_'])
    """
    found = []
    for command, word, mark in ASIDE.findall(text):
        if mark or (command and command not in ALGEBRA) or len(word) > 2 or word in ("am", "pm"):
            found.append(mark.strip() or command or word.casefold())
    return found


def math_verify_equal(answer, truth):
    r"""Whether two answers are equal to `exact`, or the math-verify package finds them mathematically equal.

    The package was made to find the answer in a text, and overlooks what it cannot read. A policy would learn what it
    overlooks. So it is asked about the algebra alone, and we decide the rest:
    * Words, unknown signs, "%" and the index of a number must be the same in both: "3 apples", "3\%" and "3_4" are not 3,
      "7:30 pm" is not 7:30, "blue and red" is not "red and blue". A percentage is a number: 50\% is 0.5, not 50.
    * A chain of equations is wrong ("1=2=3" or "4=3" for 3): of all that a policy has tried, the last would count. The name
      of a variable is allowed ("x=3" for 3).
    * A unit of measure may be added to a truth that names none: "5 cm" is right for 5, but not for 5 mm, nor 5 for 5 cm.
      A degree sign may be there or not.
    * Generous: the list 1,2 is the set {2,1}, 1:2 is 2:4, 2A is 2a, and decimals agree when rounded to six places.
    What takes too long or too much memory is wrong.

    >>> math_verify_equal(r"2\sqrt{3}", r"\sqrt{12}")  # doctest: +SKIP
    True
    """
    if exact_equal(answer, truth):
        return True
    if normalise(truth).isalpha():  # a word or an option letter: read as a product of letters, "on" would equal "no"
        return False
    # Dollar signs inside the box would let it pick one formula out of several.
    answer, truth = (without_fonts(to_latex(text)).replace("$", " ") for text in (answer, truth))
    if not re.search(r"(?<![A-Za-z\\])[A-Za-z]", truth):
        answer = UNIT.sub("", answer)
    if "=" not in truth:
        answer = NAME.sub(r"\1", answer)
    parts = re.sub(r"_\{[^{}]*\}", "", answer)  # the n=1 below a sum is no equation
    equations = max(len(re.findall(EQUALS, part)) for part in re.split("[,;]", parts))
    if equations > ("=" in truth) or asides(answer) != asides(truth):
        return False
    return ask(answer, truth, CLOCK_LIMIT) == b"True\n"


HELPER = threading.local()  # process: this thread's math-verify process; owner: the id of the process that started it


def helper():
    """This thread's math-verify process, started where there is none.

    A fork must not share its parent's, and a thread not another's: two would read each other's verdicts. Nobody waits for
    a lock, so none can be held by a thread that a fork did not take along.
    """
    process = getattr(HELPER, "process", None)
    if process is None or HELPER.owner != os.getpid() or process.poll() is not None:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        HELPER.process = subprocess.Popen([sys.executable, __file__], bufsize=0, **pipes)
        HELPER.owner = os.getpid()
    return HELPER.process


def ask(answer, truth, seconds):
    """The verdict of the math-verify process, b"True" or b"False" and a line end; b"" if there is none after so many seconds.

    Seven characters (9^{9^9}) can ask sympy for hours of arithmetic, inside C code that no Python signal handler interrupts,
    and handlers run in the main thread only. A process, though, the kernel ends at its limit (`work`), whatever it is doing
    and whoever waits for it. If it does not end, stopped or on a machine that is too busy, we end it. It serves until then,
    and the next question starts another.
    """
    question = (json.dumps([answer, truth, TIME_LIMIT]) + "\n").encode()
    # The clock counts our own waiting, so that a run stopped by Ctrl-Z, and its helper with it, may go on where it was.
    waiting = iter(range(round(10 * seconds)))
    for _ in range(2):  # one more try if it dies for another reason than its limit: someone else ended it
        process, verdict = None, b""
        try:
            process = helper()
            process.stdin.write(question)  # shorter than a pipe's buffer, so that this never waits
            answers = select.poll()
            answers.register(process.stdout, select.POLLIN)
            if any(answers.poll(100) for _ in waiting):
                verdict = os.read(process.stdout.fileno(), 100)  # b"" if it has died
            else:
                break
        except OSError:  # it died before the question reached it, or the system starts no more processes
            pass
        finally:
            if process and not verdict:  # over a limit; or we were interrupted, and a late verdict must not answer the next question
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.5)
        if verdict or (process and process.returncode == -signal.SIGPROF):
            return verdict
    else:
        warnings.warn("grader math-verify: its process died twice or does not start (python reward.py shows why): counted as wrong")
    return b""


def work():
    """The math-verify process: a JSON line [answer, truth, seconds] in, "True" or "False" out, until its input is closed.

    The input closes when the process that asks is gone, however it went, so none is left behind.
    """
    import resource

    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C reaches us too, but the run may want to finish its step
        signal.signal(number, signal.SIG_IGN)
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.parser import NormalizationConfig

    with contextlib.suppress(ValueError, OSError):  # not every system grants it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    # LaTeX only: the package's plain-expression reader goes through sympy's parse_expr, which calls eval(). And units stay:
    # the package takes many words for one, "apples" among them.
    normal = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    latex = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=normal)]
    # The whole box or nothing: of a text that it cannot read, it would look for a formula that it can.
    only = dict(extraction_mode="first_match", fallback_mode="no_fallback", parsing_timeout=None)
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no verdict
    for line in sys.stdin:
        answer, truth, seconds = json.loads(line)
        # SIGPROF without a handler: the kernel ends the process. Processor time, so that a busy machine changes no reward.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            gold, guess = (parse(r"\boxed{" + text + "}", latex, **only) for text in (truth, answer))
            equal = bool(verify(gold, guess, timeout_seconds=None))
        except Exception:
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(f"{equal}\n")  # in one piece, which print is not where Python's output is unbuffered
        replies.flush()


GRADERS = {"exact": exact_equal, "math-verify": math_verify_equal}


def find_grader(grader):
    """The function of a grader; ValueError for an unknown name, ImportError where math-verify is not installed."""
    if grader not in GRADERS:
        raise ValueError(f"unknown grader {grader!r}: choose one of {', '.join(GRADERS)}")
    if grader == "math-verify":
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            message = "grader math-verify is not installed: pip install math-verify or use --grader exact"
            raise ImportError(message) from error
    return GRADERS[grader]


def check_grader(grader):
    """Fail early: scripts call this at start-up, so that a run does not die at its first reward.

    Args: grader (str): a key of GRADERS.
    Errors: ValueError for an unknown name, ImportError where math-verify is not installed or does not start.

    >>> check_grader("exact")
    """
    find_grader(grader)
    if grader == "math-verify" and ask("2", "1+1", START_LIMIT) != b"True\n":
        raise ImportError("the process of grader math-verify does not start: python reward.py shows why")


def grade(response, truth, grader="exact"):
    r"""The reward R_i of one response (paper, section 4).

    Args: response (str): what the policy wrote; any text, or None. truth (str): the true answer, bare or in \boxed{} or
        $...$. grader (str): a key of GRADERS.
    Returns: float, 1.0 or 0.0. No box, or an empty one, is 0.0.
    Errors: none from the response; those of find_grader.

    >>> grade(r"<think> 2 of 4 </think> so \boxed{\frac{2}{4}}", "0.5"), grade("it is 0.5", "0.5")
    (1.0, 0.0)
    """
    equal = find_grader(grader)
    answer, truth = extract_answer(response), str(truth)
    boxed = extract_answer(truth)
    truth = (truth if boxed is None else boxed).strip()
    if answer is None or not answer.strip():
        return 0.0
    if max(len(answer), len(truth)) > MAX_LENGTH:
        return float(answer.strip() == truth)
    return float(equal(answer, truth))


def grade_example(response, example, cfg):
    """The reward of training and evaluation: `grade` against the example's answer, by the grader that `cfg.grader` names.

    A reward of your own has the same arguments and returns a float: train_step(..., reward=yours), train.main(reward=yours).

    response: str. example: prompts.Example, which also has problem and images. cfg: a Config or EvalConfig.
    """
    return grade(response, example.answer, cfg.grader)


if __name__ == "__main__":
    work()
