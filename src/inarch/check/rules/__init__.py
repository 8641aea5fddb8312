"""The rules, by what they look at; a rule is found because it is in a file of this folder."""
