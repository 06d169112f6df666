/**
 * Owns what can be said of a decoder before it is built: its description, how its graph computes, what its stages weigh.
 *
 * Invariants
 * 1. Nothing is built and no weight is read: JSON files, the headers of safetensors, the graph of an ONNX decoder.
 * 2. It fails as a build of the same choice would, with the same errors.
 */
import { relative, resolve } from 'node:path';
import { z } from 'zod';
import { DEFAULT_WEIGHT_FORMAT } from './build-model.ts';
import { describePublished, type ModelDescription, readModel } from './model-description.ts';
import { parseFile, readOptionalJson } from './model-files.ts';
import { publishedActivations, publishedStageWeights } from './published-weights.ts';
import { findPublishedGraph, readPublishedDecoder } from './slicer/published-model.ts';
import { type Activations, checkpointStageWeights, type ModelWeights } from './stage-weights.ts';
import type { WeightFormat } from './weight-storage.ts';
import type { WeightsChoice } from './weights-choice.ts';

export interface DecoderInspection {
  readonly description: ModelDescription;
  /** `model_type` of config.json, or what genai_config.json calls it; null if neither says it. */
  readonly architecture: string | null;
  readonly form:
    | { readonly kind: 'checkpoint'; readonly weights: WeightFormat }
    | {
        readonly kind: 'onnx';
        readonly variant: string;
        /** Path of the graph, relative to the model's directory. */
        readonly graph: string;
        /** Operators that are the attention of the published graph, each once; MatMul where it is written out. */
        readonly attentionOperators: readonly string[];
      };
  readonly activations: Activations;
  readonly weights: ModelWeights;
}

const typeSchema = z.looseObject({ model_type: z.string().nullish() });
const genaiTypeSchema = z.looseObject({ model: z.looseObject({ type: z.string().nullish() }) });

/** Throws model_invalid for a model that could not be built. */
export async function inspectDecoder(dir: string, choice: WeightsChoice = {}): Promise<DecoderInspection> {
  const absoluteDir = resolve(dir);
  const published = await findPublishedGraph(absoluteDir, choice.variant);
  if (published === null) return inspectCheckpoint(absoluteDir, choice.weights ?? DEFAULT_WEIGHT_FORMAT);
  const { variant, path } = published;
  const { sliced, facts } = await readPublishedDecoder(absoluteDir, path, variant);
  const operators = sliced.plan.sites.map(({ origin: { domain, opType } }) =>
    domain ? `${domain}.${opType}` : opType,
  );
  return {
    description: await describePublished(absoluteDir, facts),
    architecture: await typeOf(absoluteDir),
    form: {
      kind: 'onnx',
      variant,
      graph: relative(absoluteDir, path),
      attentionOperators: [...new Set(operators)],
    },
    activations: publishedActivations(sliced),
    weights: publishedStageWeights(sliced),
  };
}

async function inspectCheckpoint(dir: string, weights: WeightFormat): Promise<DecoderInspection> {
  const description = await readModel(dir);
  const { config } = description;
  if (config === null) throw new TypeError('a checkpoint has a configuration');
  return {
    description,
    architecture: config.modelType,
    form: { kind: 'checkpoint', weights },
    // MatMulNBits at accuracy level 4.
    activations: weights === 'int8' || weights === 'int4' ? 'int8' : 'float32',
    weights: await checkpointStageWeights(dir, config, weights),
  };
}

async function typeOf(dir: string): Promise<string | null> {
  const json = await readOptionalJson(dir, 'config.json');
  if (json !== null) return parseFile(dir, 'config.json', typeSchema, json).model_type ?? null;
  const genai = await readOptionalJson(dir, 'genai_config.json');
  return genai === null ? null : (parseFile(dir, 'genai_config.json', genaiTypeSchema, genai).model.type ?? null);
}
