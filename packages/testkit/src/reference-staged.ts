/**
 * Owns the staged graph driven in one process with plain TypeScript attention between the stages: what dense-executor
 * and attention-shards do together, without the network.
 *
 * Invariants
 * 1. A wave is one flat list of tokens of any number of sequences, prefill and decode mixed.
 * 2. A token sees the tokens before it in its own sequence and itself, nothing else; of these the last of its window.
 */
import { type BuiltModel, type ModelDescription, STAGED_INPUTS, STAGED_OUTPUTS } from '@lamina/model';
import type { AttentionSpec } from '@lamina/tensor';
import { InferenceSession, Tensor } from 'onnxruntime-node';
import { referenceSessionOptions } from './reference.ts';

/** KV of one sequence: per layer one row [numKvHeads * headDim] per token. */
export class StagedSequence {
  readonly keys: Float32Array[][];
  readonly values: Float32Array[][];
  /** Added to its positions (ModelDescription.shortSequences). */
  readonly positionOffset: number;

  constructor(numLayers: number, positionOffset = 0) {
    this.positionOffset = positionOffset;
    this.keys = Array.from({ length: numLayers }, () => []);
    this.values = Array.from({ length: numLayers }, () => []);
  }

  get numTokens(): number {
    return this.keys[0]?.length ?? 0;
  }
}

export interface WaveEntry {
  readonly sequence: StagedSequence;
  /** New tokens of the sequence, at least one. */
  readonly tokenIds: readonly number[];
}

export class StagedReference {
  readonly model: ModelDescription;
  readonly #session: InferenceSession;

  private constructor(session: InferenceSession, model: ModelDescription) {
    this.#session = session;
    this.model = model;
  }

  static async load(built: BuiltModel): Promise<StagedReference> {
    const session = await InferenceSession.create(built.stagedGraphPath, referenceSessionOptions(built));
    return new StagedReference(session, built.description);
  }

  /** A sequence of at most `numTokens` tokens. */
  newSequence(numTokens = Number.POSITIVE_INFINITY): StagedSequence {
    const { attention, shortSequences } = this.model;
    const isShort = shortSequences !== null && numTokens <= shortSequences.numTokens;
    return new StagedSequence(attention.numLayers, isShort ? shortSequences.offset : 0);
  }

  /**
   * Runs all stages over one wave and appends its KV to the sequences.
   * @returns Logits [vocabSize] of every token of the wave (`rows` given: of those rows), in the wave's order.
   */
  async runWave(wave: readonly WaveEntry[], rows?: readonly number[]): Promise<Float32Array[]> {
    const { attention, hiddenSize, vocabSize } = this.model;
    const tokens = wave.flatMap((entry) => entry.tokenIds.map((tokenId) => ({ tokenId, sequence: entry.sequence })));
    const positions = wave.flatMap(({ sequence, tokenIds }) => tokenIds.map((_, i) => sequence.numTokens + i));
    const positionIds = tokens.map(({ sequence }, row) => positions[row]! + sequence.positionOffset);
    const logitRows = rows ?? tokens.map((_, row) => row);
    const tokenIds = tokens.map(({ tokenId }) => tokenId);
    const queryWidth = attention.numHeads * attention.headDim;
    let hidden = new Tensor('float32', new Float32Array(0), [1, 0, hiddenSize]);
    let attended = new Tensor('float32', new Float32Array(0), [1, 0, queryWidth]);
    for (let stage = 0; stage < attention.numLayers; stage++) {
      const outputs = await this.#session.run({
        [STAGED_INPUTS.stage.name]: int64([stage], []),
        [STAGED_INPUTS.tokenIds.name]: stage === 0 ? int64(tokenIds, [1, tokens.length]) : int64([], [1, 0]),
        [STAGED_INPUTS.positionIds.name]: int64(positionIds, [1, tokens.length]),
        [STAGED_INPUTS.hidden.name]: hidden,
        [STAGED_INPUTS.attention.name]: attended,
        [STAGED_INPUTS.logitRows.name]: int64([], [0]),
      });
      const [query, key, value] = [STAGED_OUTPUTS.query, STAGED_OUTPUTS.key, STAGED_OUTPUTS.value].map(({ name }) =>
        floats(outputs, name),
      );
      if (query === undefined || key === undefined || value === undefined) throw new TypeError('no Q, K or V');
      const output = attend(attention, stage, tokens, positions, { query, key, value });
      attended = new Tensor('float32', output, [1, tokens.length, queryWidth]);
      const hiddenOut = floats(outputs, STAGED_OUTPUTS.hiddenOut.name);
      hidden = new Tensor('float32', hiddenOut, [1, tokens.length, hiddenSize]);
    }
    const outputs = await this.#session.run({
      [STAGED_INPUTS.stage.name]: int64([attention.numLayers], []),
      [STAGED_INPUTS.tokenIds.name]: int64([], [1, 0]),
      [STAGED_INPUTS.positionIds.name]: int64(positionIds, [1, tokens.length]),
      [STAGED_INPUTS.hidden.name]: hidden,
      [STAGED_INPUTS.attention.name]: attended,
      [STAGED_INPUTS.logitRows.name]: int64(logitRows, [logitRows.length]),
    });
    const logits = floats(outputs, STAGED_OUTPUTS.logits.name);
    return logitRows.map((_, i) => logits.slice(i * vocabSize, (i + 1) * vocabSize));
  }

  async release(): Promise<void> {
    await this.#session.release();
  }
}

function int64(values: readonly number[], dims: readonly number[]): Tensor {
  return new Tensor('int64', BigInt64Array.from(values, BigInt), dims);
}

function floats(outputs: InferenceSession.ReturnType, name: string): Float32Array {
  const output = outputs[name];
  if (!(output instanceof Tensor) || !(output.data instanceof Float32Array)) {
    throw new TypeError(`the graph has no float32 output '${name}'`);
  }
  return output.data;
}

/** Appends K and V of the wave's tokens and returns [T, numHeads * headDim]. */
function attend(
  { numHeads, numKvHeads, headDim, scale, softcap, windowTokens, sinkLogits, alibiSlopes }: AttentionSpec,
  layer: number,
  tokens: readonly { readonly sequence: StagedSequence }[],
  positions: readonly number[],
  { query, key, value }: Readonly<Record<'query' | 'key' | 'value', Float32Array>>,
): Float32Array {
  const kvWidth = numKvHeads * headDim;
  const output = new Float32Array(tokens.length * numHeads * headDim);
  for (const [row, { sequence }] of tokens.entries()) {
    sequence.keys[layer]?.push(key.slice(row * kvWidth, (row + 1) * kvWidth));
    sequence.values[layer]?.push(value.slice(row * kvWidth, (row + 1) * kvWidth));
  }
  for (const [row, { sequence }] of tokens.entries()) {
    const end = positions[row]! + 1;
    const window = windowTokens?.[layer] ?? 0;
    const first = window === 0 ? 0 : Math.max(0, end - window);
    const keys = sequence.keys[layer]!.slice(first, end);
    const values = sequence.values[layer]!.slice(first, end);
    for (let head = 0; head < numHeads; head++) {
      const at = (row * numHeads + head) * headDim;
      const kv = Math.floor(head / (numHeads / numKvHeads)) * headDim;
      const slope = alibiSlopes?.[head] ?? 0;
      const scores = keys.map((k, token) => {
        let dot = 0;
        for (let d = 0; d < headDim; d++) dot += query[at + d]! * k[kv + d]!;
        const score = dot * scale;
        const capped = softcap === undefined ? score : softcap * Math.tanh(score / softcap);
        return capped + slope * (first + token - (end - 1));
      });
      const sink = sinkLogits?.[layer]?.[head] ?? Number.NEGATIVE_INFINITY;
      const maximum = Math.max(sink, ...scores);
      const weights = scores.map((score) => Math.exp(score - maximum));
      const sum = weights.reduce((a, b) => a + b, Math.exp(sink - maximum));
      for (let d = 0; d < headDim; d++) {
        let mixed = 0;
        for (let token = 0; token < end - first; token++) mixed += weights[token]! * values[token]![kv + d]!;
        output[at + d] = mixed / sum;
      }
    }
  }
  return output;
}
