/**
 * Owns ONNX Runtime driven directly from JavaScript: the uncut graph with GroupQueryAttention and our int8 weights, KV in
 * and out as tensors. The graph's KV is float32, as published CPU graphs have it.
 *
 * Invariants
 * 1. The KV of the prompts is random numbers of full size: what attention costs does not depend on them, and computing
 *    32 prompts in one graph would need logits for every prompt token.
 * 2. KV that a step gave out goes into the next one, so contexts grow as they do for everyone.
 */
import { buildModel, readModel, UNCUT_NAMES } from '@lamina/model';
import { InferenceSession, Tensor } from 'onnxruntime-node';
import { builtCacheOf, checkpointOf, shapeOf } from '../models.ts';
import { type Contestant, type Opened, promptOf, WARM_UP_STEPS, type WindowLimits, type Workload } from './peer.ts';

export class OrtLoopPeer implements Contestant {
  readonly name = 'ONNX Runtime loop';
  #session: InferenceSession | undefined;
  #caches: Record<string, Tensor> = {};
  #tokens: bigint[] = [];
  #heldTokens = 0;
  #vocabSize = 0;
  #numLayers = 0;

  async open({ model, directory, numRequests, contextTokens, threads }: Workload): Promise<Opened> {
    const { shape } = shapeOf(model);
    const checkpoint = await checkpointOf(directory, model);
    await readModel(checkpoint);
    if (this.#session === undefined) {
      const built = await buildModel(checkpoint, { cacheDir: builtCacheOf(directory), weights: 'int8' });
      this.#session = await InferenceSession.create(built.uncutGraphPath, {
        executionProviders: ['cpu'],
        intraOpNumThreads: threads,
        interOpNumThreads: 1,
        enableMemPattern: false,
        extra: { session: { model_external_initializers_file_folder_path: built.dataDir } },
      });
    }
    const { numLayers, numKvHeads, headDim, vocabSize } = shape;
    this.#vocabSize = vocabSize;
    this.#numLayers = numLayers;
    const dims = [numRequests, numKvHeads, contextTokens, headDim];
    const numFloats = numRequests * numKvHeads * contextTokens * headDim;
    for (let layer = 0; layer < numLayers; layer++) {
      for (const part of ['key', 'value'] as const) {
        const floats = Float32Array.from({ length: numFloats }, () => Math.random() - 0.5);
        this.#caches[UNCUT_NAMES.past(layer, part)] = new Tensor('float32', floats, dims);
      }
    }
    this.#heldTokens = contextTokens;
    this.#tokens = Array.from({ length: numRequests }, (_, i) => BigInt(promptOf(i, 1, vocabSize)[0]!));
    const mib = (numLayers * 2 * numFloats * 4) / 2 ** 20;
    return { promptTokensPerSecond: null, held: `${mib.toFixed(0)} MiB of random float32 KV` };
  }

  async window({ minSteps, maxSeconds }: WindowLimits): Promise<number> {
    for (let step = 0; step < WARM_UP_STEPS; step++) await this.#step();
    const startedMs = performance.now();
    let steps = 0;
    while (steps < minSteps && (steps < 2 || performance.now() < startedMs + maxSeconds * 1000)) {
      await this.#step();
      steps++;
    }
    return (1000 * steps * this.#tokens.length) / (performance.now() - startedMs);
  }

  close(): Promise<void> {
    this.#caches = {};
    return Promise.resolve();
  }

  async dispose(): Promise<void> {
    await this.#session?.release();
    this.#session = undefined;
  }

  async #step(): Promise<void> {
    const session = this.#session;
    if (session === undefined) throw new Error('not open');
    const numRequests = this.#tokens.length;
    const total = this.#heldTokens + 1;
    const outputs = await session.run({
      ...this.#caches,
      [UNCUT_NAMES.tokenIds]: new Tensor('int64', BigInt64Array.from(this.#tokens), [numRequests, 1]),
      [UNCUT_NAMES.seqlensK]: new Tensor('int32', new Int32Array(numRequests).fill(total - 1), [numRequests]),
      [UNCUT_NAMES.totalSequenceLength]: new Tensor('int32', Int32Array.of(total), []),
    });
    for (let layer = 0; layer < this.#numLayers; layer++) {
      for (const part of ['key', 'value'] as const) {
        const present = outputs[UNCUT_NAMES.present(layer, part)];
        if (present?.dims[2] !== total)
          throw new Error(`ONNX Runtime gave KV of ${present?.dims[2]} tokens where ${total} belong`);
        this.#caches[UNCUT_NAMES.past(layer, part)] = present;
      }
    }
    const logits = outputs[UNCUT_NAMES.logits]?.data;
    if (!(logits instanceof Float32Array)) throw new Error('ONNX Runtime gave no logits');
    this.#tokens = this.#tokens.map((_, i) =>
      BigInt(argmax(logits.subarray(i * this.#vocabSize, (i + 1) * this.#vocabSize))),
    );
    this.#heldTokens = total;
  }
}

function argmax(values: Float32Array): number {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i]! > values[best]!) best = i;
  return best;
}
