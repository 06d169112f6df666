/**
 * Owns the check that an LM head which config.json calls tied is the embedding.
 *
 * Invariants
 * 1. A head of its own that the checkpoint has and config.json denies is model_invalid: transformers 4 drops it, 5 uses
 *    it, so either answer would be some user's wrong one. A copy of the embedding (Qwen 3 0.6B has one) is no problem.
 */
import { architectureOf } from './architecture.ts';
import type { ModelConfig } from './model-config.ts';
import { modelInvalid } from './model-error.ts';
import type { Checkpoint } from './safetensors.ts';
import { rootOf } from './weight-layout.ts';

const CHUNK_BYTES = 8 * 1024 * 1024;

/** Throws model_invalid if the tied head of `checkpoint` has other values than its embedding. */
export async function checkTiedHead(config: ModelConfig, checkpoint: Checkpoint): Promise<void> {
  const architecture = architectureOf(config.modelType);
  if (architecture === undefined || !config.tieWordEmbeddings) return;
  const root = rootOf(architecture, checkpoint);
  const headName = `${root.head}lm_head.weight`;
  if (!checkpoint.has(headName)) return;
  const shape = [config.vocabSize, config.hiddenSize];
  const embedding = checkpoint.tensor(`${root.body}${architecture.embedding}.weight`, shape);
  const head = checkpoint.tensor(headName, shape);
  let isSame = head.dtype === embedding.dtype;
  for (let at = 0; isSame && at < head.byteLength; at += CHUNK_BYTES) {
    const [a, b] = await Promise.all([head.read(at, CHUNK_BYTES), embedding.read(at, CHUNK_BYTES)]);
    isSame = a.equals(b);
  }
  if (isSame) return;
  const problem = `tensor '${headName}' has other values than the embedding, but config.json says that they are tied`;
  const remedy = `set tie_word_embeddings to false to use it, or remove the tensor`;
  throw modelInvalid(head.file, problem, remedy);
}
