/** What the benchmark uses of node-llama-cpp, so that it is type-checked where the peer is not installed. */
declare module 'node-llama-cpp' {
  export interface LlamaSequence {
    /** Where the next token goes: tokens that are held. */
    readonly nextTokenIndex: number;
    evaluate(
      tokens: readonly number[],
      options: { temperature: number; yieldEogTokens: boolean },
    ): AsyncGenerator<number, void, void>;
    dispose(): Promise<void>;
  }
  export interface LlamaContext {
    readonly kvCacheKeyType: number;
    readonly kvCacheValueType: number;
    /** Bytes of the state, KV of all sequences included. */
    readonly stateSize: number;
    readonly currentThreads: number;
    getSequence(): LlamaSequence;
    dispose(): Promise<void>;
  }
  export interface LlamaModel {
    createContext(options: {
      sequences: number;
      contextSize: number;
      batchSize: number;
      threads: { ideal: number; min: number };
    }): Promise<LlamaContext>;
    dispose(): Promise<void>;
  }
  export interface Llama {
    loadModel(options: { modelPath: string }): Promise<LlamaModel>;
    dispose(): Promise<void>;
  }
  export function getLlama(options: {
    gpu: false;
    build: 'never';
    logLevel: 'error';
    maxThreads: number;
    progressLogs: boolean;
  }): Promise<Llama>;
  export const GgmlType: { readonly F16: number };
}
