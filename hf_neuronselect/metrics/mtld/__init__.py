"""Lexical diversity (MTLD)."""
