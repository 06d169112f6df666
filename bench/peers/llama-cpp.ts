/**
 * Owns llama.cpp through node-llama-cpp: parallel sequences of one context, continuous batching, flash attention as it
 * chooses, float16 KV.
 */
import { GgmlType, getLlama, type Llama, type LlamaContext, type LlamaModel, type LlamaSequence } from 'node-llama-cpp';
import type { Quantization } from '../gguf.ts';
import { ggufOf, shapeOf } from '../models.ts';
import { type Contestant, type Opened, promptOf, WARM_UP_STEPS, type WindowLimits, type Workload } from './peer.ts';

/** Prompt tokens of one batch: llama.cpp's own default. */
const BATCH_TOKENS = 512;
/** llama.cpp rounds a context up to so many tokens. */
const CONTEXT_UNIT = 256;

class LiveSequence {
  readonly sequence: LlamaSequence;
  readonly #tokens: AsyncGenerator<number, void, void>;
  numTokens = 0;

  constructor(sequence: LlamaSequence, prompt: readonly number[]) {
    this.sequence = sequence;
    this.#tokens = sequence.evaluate(prompt, { temperature: 0, yieldEogTokens: true });
  }

  async step(): Promise<void> {
    if ((await this.#tokens.next()).done === true) throw new Error('llama.cpp ended a sequence by itself');
    this.numTokens++;
  }

  async end(): Promise<void> {
    await this.#tokens.return();
    await this.sequence.dispose();
  }
}

export class LlamaCppPeer implements Contestant {
  readonly name: string;
  readonly #type: Quantization;
  #llama: Llama | undefined;
  #model: LlamaModel | undefined;
  #modelName = '';
  #context: LlamaContext | undefined;
  #live: LiveSequence[] = [];
  #contextTokens = 0;

  constructor(name: string, type: Quantization) {
    this.name = name;
    this.#type = type;
  }

  async open(workload: Workload): Promise<Opened> {
    const { numRequests, contextTokens, maxNewTokens, threads } = workload;
    const { shape } = shapeOf(workload.model);
    const model = await this.#load(workload);
    const contextSize = Math.ceil((contextTokens + maxNewTokens) / CONTEXT_UNIT) * CONTEXT_UNIT;
    const context = await model.createContext({
      sequences: numRequests,
      contextSize,
      batchSize: Math.max(BATCH_TOKENS, numRequests),
      threads: { ideal: threads, min: threads },
    });
    this.#context = context;
    if (context.kvCacheKeyType !== GgmlType.F16 || context.kvCacheValueType !== GgmlType.F16)
      throw new Error('llama.cpp keeps KV in another type than float16');
    const emptyBytes = context.stateSize;
    const prompts = Array.from({ length: numRequests }, (_, i) => promptOf(i, contextTokens, shape.vocabSize));
    this.#contextTokens = contextTokens;
    const startedMs = performance.now();
    this.#live = prompts.map((prompt) => new LiveSequence(context.getSequence(), prompt));
    await Promise.all(this.#live.map((live) => live.step()));
    const seconds = (performance.now() - startedMs) / 1000;
    const heldBytes = context.stateSize - emptyBytes;
    const kvBytes = numRequests * contextTokens * shape.numLayers * 2 * shape.numKvHeads * shape.headDim * 2;
    if (heldBytes < kvBytes)
      throw new Error(`llama.cpp holds ${heldBytes} bytes of state where float16 KV of the prompts has ${kvBytes}`);
    this.#checkHeld();
    return {
      promptTokensPerSecond: (numRequests * contextTokens) / seconds,
      held: `${(heldBytes / 2 ** 20).toFixed(0)} MiB of state for ${(kvBytes / 2 ** 20).toFixed(0)} MiB of KV, ${context.currentThreads} threads`,
    };
  }

  async window({ minSteps, maxSeconds }: WindowLimits): Promise<number> {
    const deadlineMs = performance.now() + maxSeconds * 1000;
    const rates = await Promise.all(
      this.#live.map(async (live) => {
        for (let step = 0; step < WARM_UP_STEPS; step++) await live.step();
        const startedMs = performance.now();
        let steps = 0;
        while (steps < minSteps && (steps < 2 || performance.now() < deadlineMs)) {
          await live.step();
          steps++;
        }
        return (1000 * steps) / (performance.now() - startedMs);
      }),
    );
    this.#checkHeld();
    return rates.reduce((sum, rate) => sum + rate, 0);
  }

  async close(): Promise<void> {
    const live = this.#live;
    this.#live = [];
    await Promise.all(live.map((each) => each.end()));
    await this.#context?.dispose();
    this.#context = undefined;
  }

  async dispose(): Promise<void> {
    await this.close();
    await this.#model?.dispose();
    await this.#llama?.dispose();
  }

  /** The newest token of a sequence has no KV yet. */
  #checkHeld(): void {
    for (const { sequence, numTokens } of this.#live) {
      const tokens = this.#contextTokens + numTokens - 1;
      if (sequence.nextTokenIndex < tokens)
        throw new Error(`llama.cpp holds ${sequence.nextTokenIndex} of ${tokens} tokens`);
    }
  }

  async #load({ model, threads, directory }: Workload): Promise<LlamaModel> {
    this.#llama ??= await getLlama({
      gpu: false,
      build: 'never',
      logLevel: 'error',
      maxThreads: threads,
      progressLogs: false,
    });
    if (this.#modelName !== model) {
      await this.#model?.dispose();
      this.#model = await this.#llama.loadModel({ modelPath: await ggufOf(directory, model, this.#type) });
      this.#modelName = model;
    }
    if (this.#model === undefined) throw new Error('no model');
    return this.#model;
  }
}
