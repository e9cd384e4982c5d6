"""foreign/command_line.py and foreign/other_names.py: names of others, errors of one line."""

import argparse

import pytest

from foreign.command_line import Parser


def parser() -> Parser:
    result = Parser(
        prog="x.py",
        also={
            "--max-seq-len": "--max-length",
            "--bf16": "--dtype bfloat16",
            "--bf16 auto": "--dtype auto",
            "--pack": "--packing",
            "--save-strategy no": "--save-steps 0",
            "--save-strategy steps": "--save-steps",
            "--save-strategy epoch": "--save-steps -1",
            "--stage sft": "",
            "--stage none": "",
            "--quiet true": "",
            "--upload true": "--upload",
            "--upload-name": "--upload",
            "--kind Auto": "",
            "--field": "--prompt field=",
            "--field text": "",
        },
        elsewhere={"--stage": "leave it out", "--fsdp": "start it with torchrun"},
    )
    result.add_argument("--max-length", type=int)
    result.add_argument("--dtype", choices=("auto", "bfloat16", "float16"))
    result.add_argument("--packing", action=argparse.BooleanOptionalAction)
    result.add_argument("--chat", action="store_true")
    result.add_argument("--prompt")
    result.add_argument("--save-steps", type=int)
    result.add_argument("--upload")
    return result


def read(text: str) -> dict[str, object]:
    found = vars(parser().parse_args(text.split()))
    return {n: v for n, v in found.items() if v is not None and (n, v) != ("chat", False)}


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("--max-length 8", {"max_length": 8}),
        ("--max_length 8", {"max_length": 8}),
        ("--max_length=8", {"max_length": 8}),
        ("--max_seq_len 8", {"max_length": 8}),
        ("--max-seq-len=8", {"max_length": 8}),
        ("--bf16", {"dtype": "bfloat16"}),
        ("--bf16 True --max-length 8", {"dtype": "bfloat16", "max_length": 8}),
        ("--packing", {"packing": True}),
        ("--packing true", {"packing": True}),
        ("--packing=TRUE --chat", {"packing": True, "chat": True}),
        ("--pack true", {"packing": True}),
        ("--no-packing false", {"packing": True}),
        ("--chat True", {"chat": True}),
        ("--packing yes", {"packing": True}),
        ("--packing off --chat", {"packing": False, "chat": True}),
        ("--bf16 auto --chat", {"dtype": "auto", "chat": True}),
        ("--bf16=true --dtype bfloat16", {"dtype": "bfloat16"}),
        ("--bf16 false --dtype=float16", {"dtype": "float16"}),
        ("--save_strategy no", {"save_steps": 0}),
        ("--save-strategy=steps --save-steps 7", {"save_steps": 7}),
        ("--save-steps=7 --save-strategy steps", {"save_steps": 7}),
        ("--save-strategy epoch --max-length 8", {"save_steps": -1, "max_length": 8}),
        ("--stage sft --quiet --chat", {"chat": True}),
        ("--quiet On --kind Auto --chat", {"chat": True}),
        ("--upload a/b", {"upload": "a/b"}),
        ("--upload --upload_name a/b --chat", {"upload": "a/b", "chat": True}),
        # the last one
        ("--max-length 8 --max_length 9", {"max_length": 9}),
        ("--packing --no-packing", {"packing": False}),
        # a value is left as it is
        ("--field text --chat", {"chat": True}),
        ("--field Text", {"prompt": "field=Text"}),
        ("--prompt a_b --packing", {"prompt": "a_b", "packing": True}),
        ("--prompt true", {"prompt": "true"}),
    ],
)
def test_names_and_switches_of_others_are_understood(typed: str, found: dict[str, object]) -> None:
    assert read(typed) == found


@pytest.mark.parametrize("typed", ["--packing false", "--no_packing", "--pack=false"])
def test_a_switch_is_switched_off(typed: str) -> None:
    assert parser().parse_args(typed.split()).packing is False


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--max-lenght 8", "--max-lenght is unknown: did you mean --max-length?"),
        ("--max_seq_lenn 8", "--max_seq_lenn is unknown: did you mean --max-length?"),
        ("--zzz", "--zzz is unknown"),
        ("more", "arguments must begin with a flag's name: got 'more'"),
        ("--packing=7", "--packing must be left bare, or be true or false: got '7'"),
        ("--bf16=bfloat16", "--bf16 must be left bare, or be true or false: got 'bfloat16'"),
        ("--bf16 false", "--bf16 false does not say enough: give --dtype, too"),
        ("--save-strategy steps", "--save-strategy steps does not say enough: give --save-steps"),
        (
            "--save-strategy steps --save-steps 0",
            "--save-strategy (steps) and --save-steps (0) contradict each other",
        ),
        (
            "--save-strategy epoch --save-steps 7",
            "--save-strategy (-1) and --save-steps (7) contradict each other: give one of them",
        ),
        ("--bf16 --dtype auto", "--bf16 (bfloat16) and --dtype (auto) contradict each other"),
        ("--dtype bfloat16 --bf16 no", "--bf16 (no) and --dtype (bfloat16) contradict"),
        ("--pack --packing false", "--pack (True) and --packing (False) contradict each other"),
        ("--stage=dpo", "--stage: leave it out; "),
        ("--upload --chat", "--upload must have a value; "),
        ("--chat false", "--chat false is how it is without the flag: leave it out"),
        ("--dtype half", "--dtype: invalid choice: 'half'"),
        ("--max-length many", "--max-length: invalid int value: 'many'"),
        ("--no\x1b[31m", "--no\\x1b[31m is unknown"),
    ],
)
def test_an_error_is_one_line(typed: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(typed.split())
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"error: {message}")
    assert line.endswith("; x.py --help lists all flags")
    assert "\x1b" not in line


def test_all_complaints_are_listed_in_one_go(capsys: pytest.CaptureFixture[str]) -> None:
    typed = "--fsdp full --z\x1b 3 --chat false --save-strategy steps --max_length many --stage=dpo"
    with pytest.raises(SystemExit):
        parser().parse_args(typed.split())
    assert capsys.readouterr().err.splitlines() == [
        "error: 6 flags must change; x.py --help lists all flags",
        "  --fsdp: start it with torchrun",
        "  --z\\x1b is unknown",
        "  --chat false is how it is without the flag: leave it out",
        "  --stage: leave it out",
        "  --save-strategy steps does not say enough: give --save-steps, too",
        "  --max-length: invalid int value: 'many'",
    ]


def test_complaints_come_before_what_ends_the_reading(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--stage", "dpo", "--prompt"])
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  --stage: leave it out",
        "  argument --prompt: expected one argument",
    ]
