"""A server in front of an edited model, with OpenAI's API: `python -m grun serve`.

edition.py is what is served, and how a store that changed takes its place; batch.py, engine.py, sampling.py, text.py
and gates.py answer many prompts at once; app.py has the routes, for which bodies.py and prompts.py read what is asked,
answers.py and replies.py give the answers, requests.py and ways.py do the rest; guard.py stands before it all, and
command.py starts it.
"""
