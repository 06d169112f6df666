/**
 * Owns what the services know of a model without building it: readModel and the ModelDescription it returns.
 *
 * Invariants
 * 1. readModel reads JSON and text only, never a weight; it is cheap enough for every service's start.
 * 2. generation_config.json wins over config.json; a field that is absent from it is null, never a made-up default.
 */
import { stat } from 'node:fs/promises';
import { basename, join, resolve } from 'node:path';
import type { AttentionSpec } from '@lamina/tensor';
import { z } from 'zod';
import { type ModelConfig, modelConfigOf, readRawConfig, tokenIdsSchema } from './model-config.ts';
import { modelInvalid } from './model-error.ts';
import { parseFile, readOptionalJson, readOptionalText, readRequiredJson } from './model-files.ts';
import { readTokenizerSettings } from './tokenizer-files.ts';

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
  readonly config: ModelConfig;
  readonly attention: AttentionSpec;
  /** Longest sequence (prompt and answer), in tokens. */
  readonly contextLength: number;
  readonly vocabSize: number;
  readonly hiddenSize: number;
  /** numLayers + 1: n attention nodes cut the decoder into n + 1 stages. */
  readonly numStages: number;
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

const chatTemplateSchema = z
  .union([z.string(), z.array(z.looseObject({ name: z.string(), template: z.string() }))])
  .nullish();

const chatTemplateFileSchema = z.looseObject({ chat_template: chatTemplateSchema });

/** Describes the Hugging Face model in `dir`. Throws model_invalid for anything missing, damaged or unsupported. */
export async function readModel(dir: string): Promise<ModelDescription> {
  const absoluteDir = resolve(dir);
  await checkDirectory(absoluteDir);
  const raw = await readRawConfig(absoluteDir);
  const config = modelConfigOf(absoluteDir, raw);
  const generationConfig = parseFile(
    absoluteDir,
    'generation_config.json',
    generationConfigSchema,
    (await readOptionalJson(absoluteDir, 'generation_config.json')) ?? {},
  );
  const tokenizer = await readTokenizerSettings(absoluteDir);
  return {
    modelId: basename(absoluteDir),
    dir: absoluteDir,
    config,
    attention: {
      numLayers: config.numLayers,
      numHeads: config.numHeads,
      numKvHeads: config.numKvHeads,
      headDim: config.headDim,
      scale: 1 / Math.sqrt(config.headDim),
    },
    contextLength: config.contextLength,
    vocabSize: config.vocabSize,
    hiddenSize: config.hiddenSize,
    numStages: config.numLayers + 1,
    eosTokenIds: tokenIds(generationConfig.eos_token_id ?? raw.eos_token_id),
    bosTokenId: generationConfig.bos_token_id ?? raw.bos_token_id ?? null,
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
    if (chosen === undefined) throw modelInvalid(join(dir, name), 'chat_template is an empty list', 'remove the field');
    return chosen.template;
  }
  return null;
}

function tokenIds(value: number | number[] | null | undefined): readonly number[] {
  if (value === null || value === undefined) return [];
  return typeof value === 'number' ? [value] : [...new Set(value)];
}
