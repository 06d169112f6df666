/**
 * Owns reading tokenizer.json and tokenizer_config.json: what of them Lamina decides on itself.
 *
 * Invariants
 * 1. `add_bos_token` of tokenizer_config.json is honoured; where it is silent, the post-processor of tokenizer.json
 *    decides, as in Hugging Face's fast tokenizers.
 * 2. A decoder whose tokens are not context-free bytes (WordPiece, CTC, word suffixes) is rejected here.
 */
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { modelInvalid } from './model-error.ts';
import { parseFile, readRequiredJson } from './model-files.ts';

/** How the text of a token is turned into bytes. */
export interface ByteRules {
  /** `byte_level`: GPT-2's printable alphabet. `plain`: UTF-8 after `replacements`, `<0xNN>` being one byte. */
  readonly alphabet: 'byte_level' | 'plain';
  /** Applied in order to the text of a plain token: [from, to]. */
  readonly replacements: readonly (readonly [string, string])[];
  readonly byteFallback: boolean;
  /** True if the decoder drops one space at the start of the whole text (SentencePiece). */
  readonly stripLeadingSpace: boolean;
}

export interface TokenizerSettings {
  /** tokenizer.json and tokenizer_config.json as parsed, for @huggingface/tokenizers. */
  readonly tokenizerJson: object;
  readonly configJson: object;
  /** What `add_bos_token` says, or whether the post-processor puts a BOS token first. */
  readonly addBosToken: boolean;
  /** True if `add_bos_token` is given, and so overrules the post-processor. */
  readonly addBosTokenIsExplicit: boolean;
  /** Text of the BOS token, or null. */
  readonly bosToken: string | null;
  /** Texts of the special tokens that chat templates name: bos_token, eos_token, unk_token, pad_token. */
  readonly namedSpecialTokens: Readonly<Record<string, string>>;
  /** Highest id + 1 of the tokens that a text can become; special tokens that are only declared do not count. */
  readonly numTokens: number;
  /** Special tokens that only tokenizer_config.json names. */
  readonly additionalSpecialTokens: readonly string[];
  readonly byteRules: ByteRules;
}

interface Decoder {
  type: string;
  prepend_scheme?: string | undefined;
  replacement?: string | undefined;
  content?: string | undefined;
  start?: number | undefined;
  stop?: number | undefined;
  pattern?: { String?: string | undefined } | undefined;
  decoders?: Decoder[] | undefined;
}

const decoderSchema: z.ZodType<Decoder> = z.looseObject({
  type: z.string(),
  prepend_scheme: z.string().optional(),
  replacement: z.string().optional(),
  content: z.string().optional(),
  start: z.int().optional(),
  stop: z.int().optional(),
  pattern: z.looseObject({ String: z.string().optional() }).optional(),
  get decoders() {
    return z.array(decoderSchema).optional();
  },
});

const postProcessorSchema = z.looseObject({
  type: z.string(),
  single: z.array(z.looseObject({ SpecialToken: z.looseObject({ id: z.string() }).optional() })).optional(),
  get processors() {
    return z.array(postProcessorSchema).optional();
  },
});

type PostProcessor = z.infer<typeof postProcessorSchema>;

const tokenizerSchema = z.looseObject({
  model: z.looseObject({
    type: z.string().optional(),
    merges: z.array(z.union([z.string(), z.array(z.string())])).optional(),
    ignore_merges: z.boolean().nullish(),
    end_of_word_suffix: z.string().nullish(),
    continuing_subword_prefix: z.string().nullish(),
    continuing_subword_suffix: z.string().nullish(),
    vocab: z.union([z.record(z.string(), z.int()), z.array(z.unknown())]),
  }),
  added_tokens: z
    .array(z.looseObject({ id: z.int().nonnegative(), content: z.string(), special: z.boolean().optional() }))
    .optional(),
  pre_tokenizer: z.looseObject({ type: z.string(), replacement: z.string().optional() }).nullish(),
  post_processor: postProcessorSchema.nullish(),
  decoder: decoderSchema.nullish(),
});

const tokenSchema = z.union([z.string(), z.looseObject({ content: z.string() })]);

const tokenizerConfigSchema = z.looseObject({
  add_bos_token: z.boolean().nullish(),
  bos_token: tokenSchema.nullish(),
  eos_token: tokenSchema.nullish(),
  unk_token: tokenSchema.nullish(),
  pad_token: tokenSchema.nullish(),
  additional_special_tokens: z.array(tokenSchema).nullish(),
});

const WORD_START = '\u2581';
/** Word starts only at the front. */
const WORD_START_FIRST = new RegExp(`^${WORD_START}*[^${WORD_START}]*$`);
const TOKENIZER_FILE = 'tokenizer.json';
const CONFIG_FILE = 'tokenizer_config.json';

/** Throws model_invalid if a file is missing, damaged, or asks for a decoder that is not supported. */
export async function readTokenizerSettings(dir: string): Promise<TokenizerSettings> {
  const tokenizerJson = parseFile(dir, TOKENIZER_FILE, tokenizerSchema, await readRequiredJson(dir, TOKENIZER_FILE));
  const configJson = parseFile(dir, CONFIG_FILE, tokenizerConfigSchema, await readRequiredJson(dir, CONFIG_FILE));
  const bosToken = contentOf(configJson.bos_token);
  const { bos_token, eos_token, unk_token, pad_token } = configJson;
  const namedSpecialTokens = Object.entries({ bos_token, eos_token, unk_token, pad_token }).flatMap(([name, token]) => {
    const text = contentOf(token);
    return text === null ? [] : [[name, text] as const];
  });
  const addsBos = bosToken !== null && firstSpecialToken(tokenizerJson.post_processor) === bosToken;
  const explicit = configJson.add_bos_token ?? null;
  if (explicit === true && bosToken === null) {
    throw modelInvalid(
      join(dir, CONFIG_FILE),
      'add_bos_token is true but bos_token is not given',
      'name the BOS token',
    );
  }
  return {
    // The library requires these fields to be present, the format does not.
    tokenizerJson: {
      normalizer: null,
      pre_tokenizer: null,
      post_processor: null,
      decoder: null,
      added_tokens: [],
      ...tokenizerJson,
      ...wordSplitOf(tokenizerJson),
    },
    configJson,
    addBosToken: explicit ?? addsBos,
    addBosTokenIsExplicit: explicit !== null,
    bosToken,
    namedSpecialTokens: Object.fromEntries(namedSpecialTokens),
    numTokens: numTokensOf(tokenizerJson),
    additionalSpecialTokens: (configJson.additional_special_tokens ?? []).map((token) => contentOf(token) ?? ''),
    byteRules: byteRulesOf(dir, tokenizerJson.decoder ?? null),
  };
}

/**
 * A SentencePiece BPE takes a whole text as one word, in n log n and some 14 us per character. Where no merge joins
 * something with a word start (U+2581) after it, tokens never span two words, so that cutting before word starts gives
 * the same tokens, and the words can be cached.
 */
function wordSplitOf({ model, pre_tokenizer: given }: z.infer<typeof tokenizerSchema>): object {
  const isWhole = given === null || given === undefined || (given.type === 'Metaspace' && !isOther(given.replacement));
  const isPlainBpe =
    model.merges !== undefined &&
    model.ignore_merges !== true &&
    [model.end_of_word_suffix, model.continuing_subword_prefix, model.continuing_subword_suffix].every(
      (affix) => !affix,
    );
  if (!isWhole || !isPlainBpe || model.merges?.some(spansWords) === true) return {};
  const pattern = { Regex: `${WORD_START}+[^${WORD_START}]*` };
  const split = { type: 'Split', pattern, behavior: 'Isolated', invert: false };
  return { pre_tokenizer: { type: 'Sequence', pretokenizers: given ? [given, split] : [split] } };
}

function isOther(replacement: string | undefined): boolean {
  return replacement !== undefined && replacement !== WORD_START;
}

function spansWords(merge: string | readonly string[]): boolean {
  const text = typeof merge === 'string' ? merge.replace(' ', '') : merge.join('');
  return text.lastIndexOf(WORD_START) > 0 && !WORD_START_FIRST.test(text);
}

/** Changes with the content of tokenizer.json and tokenizer_config.json. */
export async function tokenizerDigest(dir: string): Promise<string> {
  const files = await Promise.all([TOKENIZER_FILE, CONFIG_FILE].map((name) => readFile(join(dir, name))));
  const digests = files.map((bytes) => createHash('sha256').update(bytes).digest('hex'));
  return digests.join();
}

function numTokensOf({ model, added_tokens: added = [] }: z.infer<typeof tokenizerSchema>): number {
  const { vocab } = model;
  let end = Array.isArray(vocab) ? vocab.length : 0;
  if (!Array.isArray(vocab)) for (const id of Object.values(vocab)) end = Math.max(end, id + 1);
  for (const { id, special } of added) if (special !== true) end = Math.max(end, id + 1);
  return end;
}

function contentOf(token: z.infer<typeof tokenSchema> | null | undefined): string | null {
  if (token === null || token === undefined) return null;
  return typeof token === 'string' ? token : token.content;
}

function firstSpecialToken(postProcessor: PostProcessor | null | undefined): string | null {
  if (postProcessor === null || postProcessor === undefined) return null;
  for (const part of [postProcessor, ...(postProcessor.processors ?? [])]) {
    const first = part.single?.[0]?.SpecialToken;
    if (first !== undefined) return first.id;
  }
  return null;
}

function byteRulesOf(dir: string, decoder: Decoder | null): ByteRules {
  const parts = decoder === null ? [] : decoder.type === 'Sequence' ? (decoder.decoders ?? []) : [decoder];
  const replacements: [string, string][] = [];
  let alphabet: ByteRules['alphabet'] = 'plain';
  let byteFallback = false;
  let stripLeadingSpace = false;
  for (const part of parts) {
    if (part.type === 'ByteLevel') alphabet = 'byte_level';
    else if (part.type === 'ByteFallback') byteFallback = true;
    else if (part.type === 'Metaspace') {
      replacements.push([part.replacement ?? '\u2581', ' ']);
      stripLeadingSpace ||= part.prepend_scheme !== 'never';
    } else if (part.type === 'Replace' && part.pattern?.String !== undefined) {
      replacements.push([part.pattern.String, part.content ?? '']);
    } else if (part.type === 'Strip' && part.content === ' ' && part.start === 1 && (part.stop ?? 0) === 0) {
      stripLeadingSpace = true;
    } else if (part.type !== 'Fuse') {
      const remedy = 'use a model with a byte-level or SentencePiece BPE tokenizer';
      throw modelInvalid(join(dir, TOKENIZER_FILE), `decoder '${part.type}' is not supported yet`, remedy);
    }
  }
  return { alphabet, replacements, byteFallback, stripLeadingSpace };
}
