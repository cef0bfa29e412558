"""The training forward of every contender that is installed, for every shape of the table."""


def test_forward(run):
    run("forward")
