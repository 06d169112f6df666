/**
 * Owns what the services know of a model without building it: readModel and the ModelDescription it returns.
 *
 * Invariants
 * 1. readModel reads JSON and text, of a published ONNX decoder also the graph and small tables, never a weight; it is cheap enough for every service's start.
 * 2. generation_config.json wins over config.json; a field that is absent from it is null, never a made-up default.
 */
import { readdir, stat } from 'node:fs/promises';
import { basename, join, resolve } from 'node:path';
import { type AttentionSpec, HEAD_DIM_RANGE } from '@lamina/tensor';
import { z } from 'zod';
import { type ModelConfig, modelConfigOf } from './model-config.ts';
import { modelInvalid } from './model-error.ts';
import { parseFile, readOptionalJson, readOptionalText, readRequiredJson } from './model-files.ts';
import { readRawConfig, tokenIdsSchema } from './raw-config.ts';
import { findPublishedGraph, type PublishedFacts, readPublishedDecoder } from './slicer/published-model.ts';
import { readTokenizerSettings, type TokenizerSettings } from './tokenizer-files.ts';

/** Sampling defaults of generation_config.json; null where it is silent. */
export interface GenerationDefaults {
  readonly doSample: boolean | null;
  /** 0 (greedy) where `do_sample` is false. */
  readonly temperature: number | null;
  readonly topP: number | null;
  readonly topK: number | null;
  readonly minP: number | null;
  readonly maxNewTokens: number | null;
}

export interface ModelDescription {
  /** Name of the directory: what a request's `model` field says. */
  readonly modelId: string;
  /** Absolute path of the model's directory. */
  readonly dir: string;
  /** What config.json says of a checkpoint; null of a published ONNX decoder, whose graph says it all. */
  readonly config: ModelConfig | null;
  readonly attention: AttentionSpec;
  /** Longest sequence (prompt and answer), in tokens. */
  readonly contextLength: number;
  readonly vocabSize: number;
  readonly hiddenSize: number;
  /** numLayers + 1: n attention nodes cut the decoder into n + 1 stages. */
  readonly numStages: number;
  /**
   * Sequences of at most `numTokens` tokens, all told, are fed `offset` + position as position ids, longer ones their
   * positions (longrope). A sequence that grows beyond is computed anew from its first token. Null: no difference.
   */
  readonly shortSequences: { readonly numTokens: number; readonly offset: number } | null;
  /** Tokens that end an answer; may be several, may be none. */
  readonly eosTokenIds: readonly number[];
  readonly bosTokenId: number | null;
  /** True if the tokenizer puts the BOS token in front of a text. */
  readonly addBosToken: boolean;
  readonly generationDefaults: GenerationDefaults;
  /** Jinja source, or null if the model has no chat format. */
  readonly chatTemplate: string | null;
  /** Texts that the template may name: bos_token, eos_token, unk_token, pad_token. */
  readonly specialTokens: Readonly<Record<string, string>>;
}

const generationConfigSchema = z.looseObject({
  bos_token_id: z.int().nonnegative().nullish(),
  eos_token_id: tokenIdsSchema,
  do_sample: z.boolean().nullish(),
  temperature: z.number().nonnegative().nullish(),
  top_p: z.number().min(0).max(1).nullish(),
  top_k: z.int().nonnegative().nullish(),
  min_p: z.number().min(0).max(1).nullish(),
  max_new_tokens: z.int().positive().nullish(),
});

/** One template, or several by name: as a list, or as an object. */
const chatTemplateSchema = z
  .union([
    z.string(),
    z.array(z.looseObject({ name: z.string(), template: z.string() })),
    z
      .record(z.string(), z.string())
      .transform((templates) => Object.entries(templates).map(([name, template]) => ({ name, template }))),
  ])
  .nullish();

const chatTemplateFileSchema = z.looseObject({ chat_template: chatTemplateSchema });

/**
 * Describes the Hugging Face model or published ONNX decoder in `dir`. Throws model_invalid for anything missing,
 * damaged or unsupported.
 * @param variant Of an ONNX decoder that is published in several: see BuildOptions.
 */
export async function readModel(dir: string, variant?: string): Promise<ModelDescription> {
  const absoluteDir = resolve(dir);
  await checkDirectory(absoluteDir);
  const graph = await findPublishedGraph(absoluteDir, variant);
  if (graph === null) return describeCheckpoint(absoluteDir);
  return describePublished(absoluteDir, (await readPublishedDecoder(absoluteDir, graph.path, graph.variant)).facts);
}

/** Describes a published decoder that has been read already. */
export async function describePublished(absoluteDir: string, facts: PublishedFacts): Promise<ModelDescription> {
  const { eosTokenId, bosTokenId, ...own } = facts;
  checkHeadDim(absoluteDir, own.attention.headDim);
  return {
    ...own,
    config: null,
    ...(await describeText(absoluteDir, own.vocabSize, eosTokenId, bosTokenId)),
  };
}

async function describeCheckpoint(absoluteDir: string): Promise<ModelDescription> {
  await refusePickledWeights(absoluteDir);
  const raw = await readRawConfig(absoluteDir);
  const config = modelConfigOf(absoluteDir, raw);
  checkHeadDim(join(absoluteDir, 'config.json'), config.headDim);
  const short = config.rotaryTables[0]?.short ?? null;
  return {
    config,
    attention: attentionOf(config),
    contextLength: config.contextLength,
    vocabSize: config.vocabSize,
    hiddenSize: config.hiddenSize,
    numStages: config.numLayers + 1,
    shortSequences: short === null ? null : { numTokens: short.numTokens, offset: config.contextLength },
    ...(await describeText(absoluteDir, config.vocabSize, raw.eos_token_id, raw.bos_token_id)),
  };
}

type TextFields =
  | 'modelId'
  | 'dir'
  | 'eosTokenIds'
  | 'bosTokenId'
  | 'addBosToken'
  | 'generationDefaults'
  | 'chatTemplate'
  | 'specialTokens';

/** What the files beside config.json say; token ids that they do not give are config.json's. */
async function describeText(
  absoluteDir: string,
  vocabSize: number,
  eosTokenId: number | number[] | null | undefined,
  bosTokenId: number | null | undefined,
): Promise<Pick<ModelDescription, TextFields>> {
  const generationConfig = parseFile(
    absoluteDir,
    'generation_config.json',
    generationConfigSchema,
    (await readOptionalJson(absoluteDir, 'generation_config.json')) ?? {},
  );
  const tokenizer = await readTokenizerSettings(absoluteDir);
  checkVocabulary(absoluteDir, tokenizer, vocabSize);
  return {
    modelId: basename(absoluteDir),
    dir: absoluteDir,
    eosTokenIds: tokenIds(generationConfig.eos_token_id ?? eosTokenId),
    bosTokenId: generationConfig.bos_token_id ?? bosTokenId ?? null,
    addBosToken: tokenizer.addBosToken,
    generationDefaults: {
      doSample: generationConfig.do_sample ?? null,
      temperature: generationConfig.do_sample === false ? 0 : (generationConfig.temperature ?? null),
      topP: generationConfig.top_p ?? null,
      topK: generationConfig.top_k ?? null,
      minP: generationConfig.min_p ?? null,
      maxNewTokens: generationConfig.max_new_tokens ?? null,
    },
    chatTemplate: await readChatTemplate(absoluteDir),
    specialTokens: tokenizer.namedSpecialTokens,
  };
}

/** What the shards must know. A field that the model does not use is absent. */
function attentionOf(config: ModelConfig): AttentionSpec {
  const { numLayers, numHeads, numKvHeads, headDim, attentionScale, attentionSoftcap, windowTokens } = config;
  return {
    numLayers,
    numHeads,
    numKvHeads,
    headDim,
    scale: attentionScale,
    ...(attentionSoftcap === null ? {} : { softcap: attentionSoftcap }),
    ...(windowTokens.some((window) => window > 0) ? { windowTokens } : {}),
  };
}

/** A cluster would refuse it too, but only once its shards are told of the model. */
function checkHeadDim(file: string, headDim: number): void {
  const { minimum, maximum, multipleOf } = HEAD_DIM_RANGE;
  if (headDim >= minimum && headDim <= maximum && headDim % multipleOf === 0) return;
  const remedy = `use a model whose heads have a multiple of ${multipleOf} elements, ${minimum} to ${maximum}`;
  throw modelInvalid(file, `head_dim ${headDim} is nothing that attention shards serve`, remedy);
}

/** Every token must have an embedding; special tokens that are only declared (for images, say) need none. */
function checkVocabulary(dir: string, tokenizer: TokenizerSettings, vocabSize: number): void {
  if (tokenizer.numTokens <= vocabSize) return;
  const problem = `it has ${tokenizer.numTokens} tokens, but config.json says vocab_size ${vocabSize}`;
  const remedy = 'use the tokenizer.json and the config.json of the same model';
  throw modelInvalid(join(dir, 'tokenizer.json'), problem, remedy);
}

/** Pickled weights run code when they are loaded: they are refused, never opened. */
async function refusePickledWeights(dir: string): Promise<void> {
  const names = await readdir(dir);
  const pickled = names.find((name) => /^(pytorch_model.*|consolidated.*|model.*)\.(bin|pt|pth|ckpt)$/.test(name));
  const hasOther = names.some((name) => /\.(safetensors|onnx)$|\.safetensors\.index\.json$|^onnx$/.test(name));
  if (pickled === undefined || hasOther) return;
  const remedy =
    'convert it to safetensors (in Python: load it and call save_pretrained(..., safe_serialization=True))';
  throw modelInvalid(join(dir, pickled), 'is a pickle, which can run any code when it is loaded; refused', remedy);
}

async function checkDirectory(dir: string): Promise<void> {
  const remedy = 'give the directory of a Hugging Face model (config.json, *.safetensors, tokenizer.json)';
  let isDirectory = false;
  try {
    isDirectory = (await stat(dir)).isDirectory();
  } catch (error) {
    throw modelInvalid(dir, 'does not exist or cannot be read', remedy, error);
  }
  if (!isDirectory) throw modelInvalid(dir, 'is not a directory', remedy);
}

/** chat_template.jinja, else chat_template.json, else tokenizer_config.json; of several, the one named `default`. */
async function readChatTemplate(dir: string): Promise<string | null> {
  const jinja = await readOptionalText(dir, 'chat_template.jinja');
  if (jinja !== null) return jinja;
  for (const name of ['chat_template.json', 'tokenizer_config.json']) {
    const value =
      name === 'tokenizer_config.json' ? await readRequiredJson(dir, name) : await readOptionalJson(dir, name);
    if (value === null) continue;
    const template = parseFile(dir, name, chatTemplateFileSchema, value).chat_template ?? null;
    if (typeof template === 'string') return template;
    if (template === null) continue;
    const chosen = template.find((entry) => entry.name === 'default') ?? template[0];
    if (chosen === undefined) throw modelInvalid(join(dir, name), 'chat_template is empty', 'remove the field');
    return chosen.template;
  }
  return null;
}

function tokenIds(value: number | number[] | null | undefined): readonly number[] {
  if (value === null || value === undefined) return [];
  return typeof value === 'number' ? [value] : [...new Set(value)];
}
