/**
 * Owns recognising a directory of a published ONNX decoder and what its JSON files say of it.
 *
 *   transformers.js, optimum    onnx/model*.onnx (or beside it), config.json
 *   onnxruntime-genai           genai_config.json, and the graph that it names beside it
 *
 * Invariants
 * 1. A directory with safetensors is a checkpoint, unless a variant of its ONNX decoder is asked for by name.
 * 2. config.json decides nothing of the arithmetic here: the graph does. It is read for lengths and token ids.
 */
import { readdir } from 'node:fs/promises';
import { basename, join } from 'node:path';
import type { AttentionSpec } from '@lamina/tensor';
import { z } from 'zod';
import { modelInvalid, systemErrorCode } from '../model-error.ts';
import { parseFile, readOptionalJson } from '../model-files.ts';
import { tokenIdsSchema } from '../raw-config.ts';
import type { ShortSequences } from './length-choice.ts';
import { readOnnxFile } from './onnx-file.ts';
import { type SlicedDecoder, sliceDecoder } from './slice-decoder.ts';

/** What a published decoder and its JSON files say of the model; the rest is read as of any model. */
export interface PublishedFacts {
  readonly attention: AttentionSpec;
  readonly contextLength: number;
  readonly shortSequences: ShortSequences | null;
  readonly vocabSize: number;
  /** Widest context that is carried between stages. */
  readonly hiddenSize: number;
  readonly numStages: number;
  readonly eosTokenId: number | number[] | null;
  readonly bosTokenId: number | null;
}

export interface PublishedDecoder {
  /** Absolute path of the graph. */
  readonly path: string;
  /** fp32, fp16, q4, q4f16, int8, uint8, quantized, bnb4, ... */
  readonly variant: string;
  readonly sliced: SlicedDecoder;
  readonly facts: PublishedFacts;
}

const DEFAULT_VARIANT = 'fp32';
const GENAI_CONFIG = 'genai_config.json';
/** The variant of a graph whose name says none. */
const GENAI_VARIANT = 'genai';
const GRAPH_NAME = /^(?:decoder_)?model(?:_merged)?(?:_([a-z0-9]+))?\.onnx$/;
const RESTORE = 'restore the file from where the model was downloaded';
const SAFETENSORS = /\.safetensors$|\.safetensors\.index\.json$/;

const configSchema = z.looseObject({
  max_position_embeddings: z.int().positive().nullish(),
  n_positions: z.int().positive().nullish(),
  n_ctx: z.int().positive().nullish(),
  seq_length: z.int().positive().nullish(),
  max_seq_len: z.int().positive().nullish(),
  sliding_window: z.int().positive().nullish(),
  eos_token_id: tokenIdsSchema,
  bos_token_id: z.int().nonnegative().nullish(),
});
const nestedSchema = z.looseObject({ text_config: z.looseObject({}).nullish() });
const genaiSchema = z.looseObject({
  model: z.looseObject({
    context_length: z.int().positive().nullish(),
    eos_token_id: tokenIdsSchema,
    bos_token_id: z.int().nonnegative().nullish(),
    decoder: z.looseObject({ filename: z.string().nullish() }).nullish(),
  }),
});
type GenaiConfig = z.infer<typeof genaiSchema>['model'];

/**
 * Path of the graph that is meant by `variant`, or by none; null if the directory is no published decoder.
 * @throws LaminaError `model_invalid` that lists the variants, if it is not there or if there are several and no fp32.
 */
export async function findPublishedGraph(
  dir: string,
  variant?: string,
): Promise<{ path: string; variant: string } | null> {
  const { graphs, isCheckpoint, namedVariant } = await publishedGraphs(dir);
  if (graphs.size === 0 && variant === undefined) return null;
  if (isCheckpoint && variant === undefined) return null;
  const chosen = variant ?? namedVariant ?? (graphs.size === 1 ? [...graphs.keys()][0] : DEFAULT_VARIANT);
  const path = graphs.get(chosen ?? '');
  if (path !== undefined && chosen !== undefined) return { path, variant: chosen };
  if (graphs.size === 0) {
    const problem = `has no ONNX decoder, so none of the variant ${chosen}`;
    throw modelInvalid(dir, problem, 'name no variant, or use a model that is published as onnx/model*.onnx');
  }
  const list = `has the variants ${[...graphs.keys()].sort().join(', ')}`;
  throw modelInvalid(dir, `${list}${variant === undefined ? '' : `, not ${variant}`}`, 'name one that it has');
}

export interface PublishedGraphs {
  /** Paths by variant. */
  readonly graphs: ReadonlyMap<string, string>;
  /** Whether safetensors are beside them. */
  readonly isCheckpoint: boolean;
  /** The variant of the graph that genai_config.json names. */
  readonly namedVariant: string | undefined;
}

/** @throws LaminaError `model_invalid` when genai_config.json names a graph elsewhere. */
export async function publishedGraphs(dir: string): Promise<PublishedGraphs> {
  const graphs = new Map<string, string>();
  let isCheckpoint = false;
  for (const folder of ['', 'onnx']) {
    for (const name of await namesIn(join(dir, folder))) {
      isCheckpoint ||= folder === '' && SAFETENSORS.test(name);
      const match = GRAPH_NAME.exec(name);
      if (match !== null) graphs.set(match[1] ?? DEFAULT_VARIANT, join(dir, folder, name));
    }
  }
  const named = (await readGenaiConfig(dir))?.decoder?.filename ?? null;
  if (named === null) return { graphs, isCheckpoint, namedVariant: undefined };
  if (basename(named) !== named) {
    throw modelInvalid(join(dir, GENAI_CONFIG), `decoder.filename '${named}' is no file beside it`, RESTORE);
  }
  const match = GRAPH_NAME.exec(named);
  const namedVariant = match === null ? GENAI_VARIANT : (match[1] ?? DEFAULT_VARIANT);
  graphs.set(namedVariant, join(dir, named));
  return { graphs, isCheckpoint, namedVariant };
}

/** Cuts the graph at `path`. Throws model_invalid for a graph that cannot be cut. */
export async function readPublishedDecoder(dir: string, path: string, variant: string): Promise<PublishedDecoder> {
  const json = await readOptionalJson(dir, 'config.json');
  const { text_config: nested } = parseFile(dir, 'config.json', nestedSchema, json ?? {});
  const outer = parseFile(dir, 'config.json', configSchema, json ?? {});
  const config = { ...outer, ...(nested ? parseFile(dir, 'config.json', configSchema, nested) : {}) };
  const genai = await readGenaiConfig(dir);
  const contextLength =
    genai?.context_length ??
    config.max_position_embeddings ??
    config.n_positions ??
    config.n_ctx ??
    config.max_seq_len ??
    config.seq_length;
  if (contextLength === null || contextLength === undefined) {
    throw modelInvalid(join(dir, 'config.json'), 'max_position_embeddings is missing', RESTORE);
  }
  const sliced = sliceDecoder(await readOnnxFile(path), config.sliding_window ?? 0, contextLength);
  return {
    path,
    variant,
    sliced,
    facts: {
      attention: sliced.attention,
      contextLength,
      shortSequences: sliced.shortSequences,
      vocabSize: sliced.shape.vocabSize,
      hiddenSize: sliced.shape.hiddenSize,
      numStages: sliced.attention.numLayers + 1,
      eosTokenId: genai?.eos_token_id ?? config.eos_token_id ?? null,
      bosTokenId: genai?.bos_token_id ?? config.bos_token_id ?? null,
    },
  };
}

async function readGenaiConfig(dir: string): Promise<GenaiConfig | null> {
  const json = await readOptionalJson(dir, GENAI_CONFIG);
  return json === null ? null : parseFile(dir, GENAI_CONFIG, genaiSchema, json).model;
}

async function namesIn(dir: string): Promise<string[]> {
  try {
    return await readdir(dir);
  } catch (error) {
    if (['ENOENT', 'ENOTDIR'].includes(systemErrorCode(error))) return [];
    throw modelInvalid(dir, 'cannot be read', 'check its permissions', error);
  }
}
