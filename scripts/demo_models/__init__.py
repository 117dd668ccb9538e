"""How the demo pair of language models is made: corpus, phrasings, training, evaluation."""
