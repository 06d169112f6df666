/**
 * Owns turning a checkpoint into the two graphs and their weights file, and the cache directory that they live in.
 *
 * Invariants
 * 1. A build is keyed by content (graph-relevant configuration, checkpoint, builder version): a changed model is another
 *    directory, the same model is never built twice.
 * 2. A build becomes visible whole or not at all: it is written to a directory of its own and renamed. Any number of
 *    processes may build the same model at once; the first rename wins, the others use its result.
 * 3. A cached build is used only if its manifest names this key and every file has the size that it says.
 */
import { createHash, randomUUID } from 'node:crypto';
import { mkdir, readdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { LaminaError } from '@lamina/tensor';
import { z } from 'zod';
import type { ModelConfig } from './model-config.ts';
import { type ModelDescription, readModel } from './model-description.ts';
import { reasonOf, systemErrorCode } from './model-error.ts';
import { encodeModel, WEIGHTS_FILE_NAME } from './onnx.ts';
import { Checkpoint } from './safetensors.ts';
import { buildStagedGraph } from './staged-graph.ts';
import { buildUncutGraph } from './uncut-graph.ts';
import { layOutWeights } from './weight-layout.ts';
import { writeWeightsFile } from './weights-file.ts';

export interface BuiltModel {
  readonly description: ModelDescription;
  readonly stagedGraphPath: string;
  readonly uncutGraphPath: string;
  /** Size of the weights file that both graphs read. */
  readonly weightBytes: number;
}

export interface BuildOptions {
  /** Directory for built models; created if missing. May be shared by processes and models. */
  readonly cacheDir: string;
  /** Called with 0..1 while a build runs; once with 1 if the cache had it. */
  readonly onProgress?: (fraction: number) => void;
}

/** Raise it with every change of what is built from the same input. */
const BUILDER_VERSION = 1;
const STAGED_FILE_NAME = 'staged.onnx';
const UNCUT_FILE_NAME = 'uncut.onnx';
const MANIFEST_FILE_NAME = 'manifest.json';
/** Age at which a build that was never finished is taken for abandoned, in milliseconds. */
const ABANDONED_AFTER_MS = 6 * 60 * 60 * 1000;

const manifestSchema = z.object({ key: z.string(), files: z.record(z.string(), z.int().nonnegative()) });

/**
 * Builds the model in `dir`, or finds it built. Throws model_invalid for a model that is missing, damaged or not
 * supported, config_invalid if the cache directory cannot be written.
 */
export async function buildModel(dir: string, options: BuildOptions): Promise<BuiltModel> {
  const description = await readModel(dir);
  const checkpoint = await Checkpoint.open(description.dir);
  try {
    const key = await cacheKey(description.config, checkpoint);
    const target = join(resolve(options.cacheDir), `${description.modelId}-${key.slice(0, 16)}`);
    if (!(await isComplete(target, key))) await build(description.config, checkpoint, key, target, options.onProgress);
    options.onProgress?.(1);
    return {
      description,
      stagedGraphPath: join(target, STAGED_FILE_NAME),
      uncutGraphPath: join(target, UNCUT_FILE_NAME),
      weightBytes: (await stat(join(target, WEIGHTS_FILE_NAME))).size,
    };
  } finally {
    await checkpoint.close();
  }
}

async function cacheKey(config: ModelConfig, checkpoint: Checkpoint): Promise<string> {
  const facts = JSON.stringify([BUILDER_VERSION, config, await checkpoint.fingerprint()]);
  return createHash('sha256').update(facts).digest('hex');
}

async function build(
  config: ModelConfig,
  checkpoint: Checkpoint,
  key: string,
  target: string,
  onProgress: (fraction: number) => void = () => {},
): Promise<void> {
  const partial = `${target}.${randomUUID()}.partial`;
  try {
    await mkdir(partial, { recursive: true });
    await removeAbandoned(target);
    const layout = layOutWeights(config);
    await writeWeightsFile(join(partial, WEIGHTS_FILE_NAME), layout, config, checkpoint, onProgress);
    await writeFile(join(partial, STAGED_FILE_NAME), encodeModel(buildStagedGraph(config, layout)));
    await writeFile(join(partial, UNCUT_FILE_NAME), encodeModel(buildUncutGraph(config, layout)));
    const files = Object.fromEntries(
      await Promise.all(
        [WEIGHTS_FILE_NAME, STAGED_FILE_NAME, UNCUT_FILE_NAME].map(
          async (name) => [name, (await stat(join(partial, name))).size] as const,
        ),
      ),
    );
    await writeFile(join(partial, MANIFEST_FILE_NAME), JSON.stringify({ key, files }));
    await publish(partial, target, key);
  } catch (error) {
    await rm(partial, { recursive: true, force: true }).catch(() => {});
    if (systemErrorCode(error) === '') throw error;
    const message = `cannot write the built model to ${target} (${reasonOf(error)}); give a writable cache directory`;
    throw new LaminaError('config_invalid', message, { cause: error });
  }
}

/** Renames a finished build into place, or drops it if another process was first. */
async function publish(partial: string, target: string, key: string): Promise<void> {
  for (;;) {
    try {
      await rename(partial, target);
      return;
    } catch (error) {
      const code = systemErrorCode(error);
      if (code !== 'ENOTEMPTY' && code !== 'EEXIST' && code !== 'EPERM') throw error;
      if (await isComplete(target, key)) {
        await rm(partial, { recursive: true, force: true });
        return;
      }
      if (code === 'EPERM') throw error;
    }
    // What is there is damaged: move it aside, so that whoever has it open keeps it, and try again.
    const aside = `${target}.${randomUUID()}.partial`;
    await rename(target, aside).catch((error: unknown) => {
      if (systemErrorCode(error) !== 'ENOENT') throw error;
    });
    await rm(aside, { recursive: true, force: true });
  }
}

async function isComplete(target: string, key: string): Promise<boolean> {
  try {
    const manifest = manifestSchema.parse(JSON.parse(await readFile(join(target, MANIFEST_FILE_NAME), 'utf8')));
    if (manifest.key !== key) return false;
    for (const name of [WEIGHTS_FILE_NAME, STAGED_FILE_NAME, UNCUT_FILE_NAME]) {
      if ((await stat(join(target, name))).size !== manifest.files[name]) return false;
    }
    return true;
  } catch {
    // Absent, unreadable or no manifest: whatever the reason, the answer is to build it again.
    return false;
  }
}

/** Removes what builds of this model left behind when their process was killed. */
async function removeAbandoned(target: string): Promise<void> {
  const parent = resolve(target, '..');
  for (const name of await readdir(parent)) {
    const path = join(parent, name);
    if (!path.startsWith(`${target}.`) || !name.endsWith('.partial')) continue;
    const age = await stat(path).then(
      ({ mtimeMs }) => Date.now() - mtimeMs,
      () => 0,
    );
    if (age > ABANDONED_AFTER_MS) await rm(path, { recursive: true, force: true }).catch(() => {});
  }
}
