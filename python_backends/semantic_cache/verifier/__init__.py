"""Is it the same question? Judged by the words of two prompts, where similarity of vectors is no evidence."""
