"""The backward of every contender that is installed, for every shape of the table."""


def test_backward(run):
    run("backward")
