/**
 * Owns which model the cluster serves, and the layout of the KV that follows from it.
 *
 * Invariants
 * 1. The layout of the first executor stands while any executor lives; then another model may bring its own.
 */
import { type AttentionSpec, type KvDtype, type KvLayout, LaminaError, sameAttentionSpec } from '@lamina/tensor';
import { describeSpec } from './spec.ts';

export class ServedModel {
  readonly #blockSizeTokens: number;
  readonly #kvDtype: KvDtype;
  #modelId: string | null = null;
  #layout: KvLayout | null = null;

  constructor(blockSizeTokens: number, kvDtype: KvDtype) {
    this.#blockSizeTokens = blockSizeTokens;
    this.#kvDtype = kvDtype;
  }

  get modelId(): string | null {
    return this.#modelId;
  }

  get layout(): KvLayout | null {
    return this.#layout;
  }

  /** An executor comes that is not registered. Returns the layout that was dropped for its model's, if one was. */
  adopt(modelId: string, spec: AttentionSpec, hasExecutors: boolean): KvLayout | null {
    const former = this.#layout;
    const isSame = former === null || sameAttentionSpec(former, spec);
    if (hasExecutors && former !== null && this.#modelId !== null && (!isSame || this.#modelId !== modelId))
      throw otherModel(modelId, spec, this.#modelId, former);
    this.#modelId = modelId;
    if (former === null || !isSame)
      this.#layout = { ...spec, blockSizeTokens: this.#blockSizeTokens, kvDtype: this.#kvDtype };
    return isSame ? null : former;
  }
}

export function otherModel(modelId: string, spec: AttentionSpec, formerId: string, former: AttentionSpec): LaminaError {
  return new LaminaError(
    'invalid_request',
    `this cluster serves ${formerId} (${describeSpec(former)}), not ${modelId} (${describeSpec(spec)}); ` +
      'stop its executors first, or start another cluster',
  );
}
