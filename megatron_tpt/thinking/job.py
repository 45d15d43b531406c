"""What the options of an augment run resolve to: its input, its template, its settings, and the generator behind it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.generation import EngineOptions, Sampling, check_context, check_model, load_tokenizer
from megatron_tpt.jobs.folder import JobFolder
from megatron_tpt.records import Columns, Source, describe, read_blocks
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.prompts import Documents, Prompt, Template, ends_in, load_template, render
from megatron_tpt.thinking.rows import RowWorker
from megatron_tpt.thinking.settings import make_settings
from megatron_tpt.thinking.shards import SETTINGS_NAME
from megatron_tpt.thinking.thoughts import ThoughtReader

# So many bad rows and no good one at the start of the input are a wrong column name, not bad luck.
_MAX_BAD_AT_START = 100


@dataclass(frozen=True)
class Generator:
    """What makes requests of rows, and the engine that they are for."""

    worker: RowWorker
    engine_options: EngineOptions
    sampling: Sampling


@dataclass(frozen=True)
class AugmentJob:
    """A run that was checked and can begin."""

    options: AugmentOptions
    sources: list[Source]
    template: Template
    settings: dict[str, Any]

    @cached_property
    def columns(self) -> Columns:
        """What to read; the prompt's own columns come as `meta`."""
        wanted = [name for name in self.template.placeholders if name in self.options.text_columns()]
        meta = tuple(dict.fromkeys([*self.options.meta_columns, *wanted]))
        return Columns(self.options.text_column, self.options.id_column, meta)

    def generator(self) -> Generator:
        """Load the tokenizer and bind the prompt to it. Raises UserError when they and the model do not fit."""
        options = self.options
        as_messages = options.api == "chat"
        tokenizer_name = options.tokenizer or (None if as_messages else options.model)
        tokenizer = load_tokenizer(tokenizer_name) if tokenizer_name else None
        documents = Documents(tokenizer, options.max_document_tokens)
        prompt = Prompt(
            self.template,
            documents,
            None if as_messages else tokenizer,
            thinking_block=options.thinking_block,
            open_tag=options.open_tag,
            chat_template_kwargs=options.chat_template_kwargs(),
        )
        tag = options.open_tag if prompt.opens_thinking else None
        begins_thinking = tokenizer is not None and ends_in(
            options.open_tag, render(self.template, tokenizer, tag, options.chat_template_kwargs())
        )
        reader = ThoughtReader(
            self.template.wants,
            options.open_tag,
            options.close_tag,
            options.truncated,
            options.filters,
            documents.count,
            begins_thinking=begins_thinking,
        )
        context = None
        if options.engine != "endpoint":
            context = check_context(options.model, prompt.max_tokens, options.max_new_tokens)
        # What a chat server's own template opens is not known here; for a model that does not think it does not matter.
        may_think = begins_thinking or (as_messages and options.thinking_block != "none")
        stop = (options.close_tag,) if may_think and self.template.wants == "thinking" else ()
        return Generator(
            RowWorker(options, self.template, documents, prompt, reader),
            options.engine_options(context, options.output / "logs"),
            Sampling(options.temperature, options.top_p, options.max_new_tokens, stop=stop),
        )


def plan(options: AugmentOptions) -> AugmentJob:
    """Check what `options` name. Raises UserError for what the user can fix; nothing is written."""
    sources = JobFolder(options.output, SETTINGS_NAME).sources(options.input)
    template = load_template(options.prompt, options.text_columns())
    if options.engine != "endpoint":
        check_model(options.model)
    job = AugmentJob(options, sources, template, make_settings(options, sources, template))
    _check_first_rows(job)
    return job


def _check_first_rows(job: AugmentJob) -> None:
    problems = []
    for source in job.sources:
        for _, rows in read_blocks(source, job.columns, _MAX_BAD_AT_START, lambda block: True):
            for row in rows:
                if row.record is not None:
                    return
                if job.options.on_bad_record == "stop":
                    raise UserError(describe(source, row))
                problems.append(f"{source.name}:{row.number + 1}: {row.problem}{row.detail}")
                if len(problems) >= _MAX_BAD_AT_START:
                    raise UserError(f"no record at the start of the input; the first row is {problems[0]}")
    if problems:
        raise UserError(f"no records in the input; the first row is {problems[0]}")
    raise UserError(f"{', '.join(job.options.input)}: no records to augment in the input")
