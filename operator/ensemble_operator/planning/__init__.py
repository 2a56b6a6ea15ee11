"""`ensemble plan`: the question from files or this machine, the options, and the answer as a table or a picture.

What decides is `allocation`; here are its files, settings and views.
"""
