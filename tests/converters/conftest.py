"""Puts towers.py beside this file within reach of the tests below it."""
