"""Opens what chooses the tokens of a session: its grammar is compiled in a thread of its own, in turns between peers.

A grammar that cannot be used is its device's error; while one compiles, steps and other sessions go on.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from isthmus.cloud_service.language.engines.places import Places
from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.language.grammar import Grammars, GrammarState
from isthmus.models.language.processors import TokenChooser
from isthmus.models.messages import Grammar, Opening


class Choosers:
    """Of one model's tokenizer."""

    def __init__(self, tokenizer: Tokenizer, wait_s: float) -> None:
        """Who would wait longer than `wait_s` for grammars of others is refused."""
        self._tokenizer, self._grammars = tokenizer, Grammars(tokenizer)
        self._places = Places(1, wait_s, "the service compiles grammars of others")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    async def open(self, opening: Opening, peer: str) -> TokenChooser:
        """Raises InvalidInput for a grammar that cannot be used, or a bias of no token; Overloaded."""
        sampling, start = opening.sampling, opening.answer_start
        if (id_ := max((id_ for id_, _ in sampling.logit_bias), default=0)) >= self._tokenizer.size:
            raise InvalidInput(f"a bias of token {id_}, outside of the vocabulary of {self._tokenizer.size}")
        if (grammar := sampling.grammar) is None:
            return TokenChooser(sampling, start)
        await self._places.take(peer)
        try:
            state = await asyncio.get_running_loop().run_in_executor(self._thread, self._compile, grammar)
        finally:
            self._places.free(peer)
        return TokenChooser(sampling, start, lambda grammar: state)

    def close(self) -> None:
        """No session is opened any more."""
        self._thread.shutdown(wait=False)

    def _compile(self, grammar: Grammar) -> GrammarState:
        """With its first token: one that is too much shows here, and not between the steps of others."""
        state = self._grammars.state(grammar, self._tokenizer.eos_ids)
        state.forced(())
        state.mask(())
        return state
