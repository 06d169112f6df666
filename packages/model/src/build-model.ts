/**
 * Owns turning a checkpoint into the two graphs and their weights file, and what makes two builds the same.
 *
 * Invariants
 * 1. A build is keyed by content (graph-relevant configuration, checkpoint, weight format, builder version): a changed
 *    model is another directory, the same model is never built twice.
 * 2. A cached build is used only if its manifest names this key and every file has the size that it says.
 * 3. Graphs name their data by paths relative to `dataDir`. Of weights that stay in place, and only of those, the key
 *    holds where they and the cache are.
 */
import { createHash } from 'node:crypto';
import { mkdir, readFile, realpath, rm, stat, writeFile } from 'node:fs/promises';
import { basename, dirname, join, relative, resolve, sep } from 'node:path';
import { LaminaError } from '@lamina/tensor';
import { z } from 'zod';
import { type ActivationBits, activationBitsHere } from './activation-bits.ts';
import { buildOnce } from './build-cache.ts';
import type { ModelConfig } from './model-config.ts';
import { describePublished, type ModelDescription, readModel } from './model-description.ts';
import { modelInvalid, reasonOf, systemErrorCode } from './model-error.ts';
import { encodeModel } from './onnx.ts';
import { Checkpoint } from './safetensors.ts';
import { buildPublished } from './slicer/build-published.ts';
import { findPublishedGraph, readPublishedDecoder } from './slicer/published-model.ts';
import { buildStagedGraph } from './staged-graph.ts';
import { checkTiedHead } from './tied-head.ts';
import { buildUncutGraph } from './uncut-graph.ts';
import { layOutWeights } from './weight-layout.ts';
import type { WeightFormat } from './weight-storage.ts';
import { writeWeightsFile } from './weights-file.ts';

export interface BuiltModel {
  readonly description: ModelDescription;
  readonly stagedGraphPath: string;
  readonly uncutGraphPath: string;
  /**
   * How the uncut graph is fed: `built` by the names of UNCUT_NAMES, its data in dataDir; `published` as transformers.js
   * feeds a decoder, its data beside it.
   */
  readonly uncutKind: 'built' | 'published';
  /**
   * Directory that the graphs' external data is relative to. A session must be told, in its configuration entry
   * `session.model_external_initializers_file_folder_path`: ONNX Runtime reads no external data outside of it.
   */
  readonly dataDir: string;
  /** Size of the weights file that both graphs read; weights that stay in place are not in it. */
  readonly weightBytes: number;
}

export interface BuildOptions {
  /** Directory for built models; created if missing. May be shared by processes and models. */
  readonly cacheDir: string;
  /** How matrices, embedding and LM head are stored; see docs/models.md. */
  readonly weights?: WeightFormat;
  /**
   * Of a published ONNX decoder, which of its graphs: `fp32` is model.onnx, `q4` model_q4.onnx, ... Default: the only
   * one, else fp32.
   */
  readonly variant?: string | undefined;
  /** Of activations that int8 weights are multiplied with. Default: what this processor multiplies exactly. */
  readonly activationBits?: ActivationBits;
  /** Called while a build runs; once with all bytes done if the cache had it. */
  readonly onProgress?: (doneBytes: number, totalBytes: number) => void;
}

export const DEFAULT_WEIGHT_FORMAT: WeightFormat = 'f32';

/** Raise it with every change of what is built from the same input. */
const BUILDER_VERSION = 5;
const WEIGHTS_FILE_NAME = 'weights.bin';
const STAGED_FILE_NAME = 'staged.onnx';
const UNCUT_FILE_NAME = 'uncut.onnx';
const MANIFEST_FILE_NAME = 'manifest.json';
const JOURNAL_FILE_NAME = 'weights.journal';
const FILE_NAMES = [WEIGHTS_FILE_NAME, STAGED_FILE_NAME, UNCUT_FILE_NAME];

const manifestSchema = z.object({ key: z.string(), files: z.record(z.string(), z.int().nonnegative()) });

/** What is built, and where. */
interface BuildPlan {
  readonly config: ModelConfig;
  readonly checkpoint: Checkpoint;
  readonly format: WeightFormat;
  readonly activationBits: ActivationBits;
  readonly key: string;
  readonly target: string;
  readonly dataDir: string;
}

/**
 * Builds the model in `dir`, or finds it built. Throws model_invalid for a model that is missing, damaged or not
 * supported, config_invalid if the cache directory cannot be written or has too little room.
 */
export async function buildModel(dir: string, options: BuildOptions): Promise<BuiltModel> {
  const { cacheDir, weights: format = DEFAULT_WEIGHT_FORMAT, onProgress = () => {} } = options;
  const activationBits = options.activationBits ?? activationBitsHere();
  const published = await buildPublishedModel(dir, options);
  if (published !== null) return published;
  const description = await readModel(dir);
  const checkpoint = await Checkpoint.open(description.dir);
  try {
    const plan = await planBuild(description, checkpoint, { format, activationBits }, resolve(cacheDir));
    const { key, target, dataDir } = plan;
    await writing(target, () =>
      buildOnce(target, {
        isComplete: (path) => isComplete(path, key),
        build: (path) => build(plan, path, onProgress),
      }),
    );
    const weightBytes = (await stat(join(target, WEIGHTS_FILE_NAME))).size;
    onProgress(weightBytes, weightBytes);
    return {
      description,
      stagedGraphPath: join(target, STAGED_FILE_NAME),
      uncutGraphPath: join(target, UNCUT_FILE_NAME),
      uncutKind: 'built',
      dataDir,
      weightBytes,
    };
  } finally {
    await checkpoint.close();
  }
}

/** Runs what writes to the cache; says of a system error what it means. */
async function writing<T>(target: string, write: () => Promise<T>): Promise<T> {
  try {
    return await write();
  } catch (error) {
    if (systemErrorCode(error) === '') throw error;
    const message = `cannot write the built model to ${target} (${reasonOf(error)}); give a writable cache directory`;
    throw new LaminaError('config_invalid', message, { cause: error });
  }
}

/** The staged graph of a published decoder, or null if the directory is none. */
async function buildPublishedModel(
  dir: string,
  { cacheDir, variant, onProgress = () => {} }: BuildOptions,
): Promise<BuiltModel | null> {
  const absoluteDir = resolve(dir);
  const graph = await findPublishedGraph(absoluteDir, variant);
  if (graph === null) return null;
  const decoder = await readPublishedDecoder(absoluteDir, graph.path, graph.variant);
  const description = await describePublished(absoluteDir, decoder.facts);
  const built = await writing(cacheDir, async () => {
    const places = {
      cacheDir: await existingRealPath(resolve(cacheDir)),
      commonDirectory,
      locationOf: (dataDir: string, path: string) => relative(dataDir, path).replaceAll(sep, '/'),
    };
    return buildPublished(description.modelId, decoder, places, onProgress);
  });
  return { description, ...built, uncutGraphPath: graph.path, uncutKind: 'published' };
}

async function planBuild(
  { config, modelId }: ModelDescription,
  checkpoint: Checkpoint,
  { format, activationBits }: Pick<BuildPlan, 'format' | 'activationBits'>,
  cacheDir: string,
): Promise<BuildPlan> {
  if (config === null) throw new TypeError('a published decoder is not built from a checkpoint');
  const facts: unknown[] = [BUILDER_VERSION, config, format, await checkpoint.fingerprint()];
  // Machines of two kinds may share a cache.
  if (format === 'int8') facts.push(activationBits);
  const places: string[] = [];
  if (format === 'checkpoint') {
    // Files of a downloaded model may be links: ONNX Runtime looks where they lead.
    places.push(await existingRealPath(cacheDir), ...checkpoint.realPaths);
    facts.push(places);
  }
  const key = createHash('sha256').update(JSON.stringify(facts)).digest('hex');
  const target = join(places[0] ?? cacheDir, `${modelId}-${format}-${key.slice(0, 16)}`);
  const dataDir = places.length === 0 ? target : commonDirectory([target, ...places.slice(1)]);
  return { config, checkpoint, format, activationBits, key, target, dataDir };
}

async function build(
  { config, checkpoint, format, activationBits, key, target, dataDir }: BuildPlan,
  dir: string,
  onProgress: (doneBytes: number, totalBytes: number) => void,
): Promise<void> {
  await mkdir(dir, { recursive: true });
  await checkTiedHead(config, checkpoint);
  const locationOf = (path: string): string => relative(dataDir, path).replaceAll(sep, '/');
  const weightsPath = join(target, WEIGHTS_FILE_NAME);
  const layout = layOutWeights(config, { format, activationBits, checkpoint, locationOf, weightsPath });
  const journal = join(dir, JOURNAL_FILE_NAME);
  await writeWeightsFile({ weights: join(dir, WEIGHTS_FILE_NAME), journal }, layout, checkpoint, onProgress);
  await writeFile(join(dir, STAGED_FILE_NAME), encodeModel(buildStagedGraph(config, layout)));
  await writeFile(join(dir, UNCUT_FILE_NAME), encodeModel(buildUncutGraph(config, layout)));
  const sizes = FILE_NAMES.map(async (name) => [name, (await stat(join(dir, name))).size] as const);
  const files = Object.fromEntries(await Promise.all(sizes));
  await writeFile(join(dir, MANIFEST_FILE_NAME), JSON.stringify({ key, files }));
  await rm(journal, { force: true });
}

async function isComplete(target: string, key: string): Promise<boolean> {
  try {
    const manifest = manifestSchema.parse(JSON.parse(await readFile(join(target, MANIFEST_FILE_NAME), 'utf8')));
    if (manifest.key !== key) return false;
    for (const name of FILE_NAMES) {
      if ((await stat(join(target, name))).size !== manifest.files[name]) return false;
    }
    return true;
  } catch {
    // Absent, unreadable or no manifest: whatever the reason, the answer is to build it again.
    return false;
  }
}

/** The real path of a directory that may not exist yet. */
async function existingRealPath(path: string): Promise<string> {
  try {
    return await realpath(path);
  } catch {
    const parent = dirname(path);
    return parent === path ? path : join(await existingRealPath(parent), basename(path));
  }
}

/** The deepest directory that all paths lie under. */
function commonDirectory(paths: readonly string[]): string {
  let common = dirname(paths[0] ?? sep);
  for (const path of paths) {
    while (relative(common, path).startsWith('..')) common = dirname(common);
    if (resolve(common, relative(common, path)) === path && !relative(common, path).startsWith(sep)) continue;
    throw modelInvalid(path, 'is on another drive than the cache', 'take other weights than checkpoint');
  }
  return common;
}
