"""Adapters in the forms that other programs take, each checked by what that program computes with it."""
