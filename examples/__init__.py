"""The gallery: one claim about batch normalisation in each script, on real data, with its figure.

They are installed as `bnfast.examples`; ``python -m bnfast gallery DIR`` runs them all, and each runs by itself:
``python examples/learning_rate.py DIR``. Each has a TITLE, a CAPTION of two sentences, an ALT (what is to be seen, for
who does not see it), `compute(seed)`, which returns numbers, `draw(results)`, which makes a figure of one or several of
them, and `main(folder)`, which writes it.
"""
