"""The forward with given statistics of every contender that is installed, for every shape of the table."""


def test_eval(run):
    run("eval")
