/** Owns the rows of decode: tokens per second of all requests together, all past their prompts. */
import { compareDecode, tokensNeeded } from '../alternate.ts';
import type { Context } from '../context.ts';
import { LaminaPeer } from '../peers/lamina.ts';
import { type PeerName, RemotePeer } from '../peers/remote.ts';
import { measuredTogether, type Row, type RowName } from '../rows.ts';

interface Case {
  readonly model: string;
  readonly numRequests: number;
  readonly contextTokens: number;
  /** Ours; default: int8. */
  readonly weights?: 'int4';
  /** By peer: what the ratio must reach. */
  readonly peers: Readonly<Partial<Record<PeerName, number | null>>>;
}

const SMALL = 'smollm2-135m';
const CASES: readonly Case[] = [
  {
    model: SMALL,
    numRequests: 32,
    contextTokens: 1024,
    peers: { 'llama-cpp': 2.5, 'llama-cpp-q8': 2.5, 'ort-loop': 6 },
  },
  { model: SMALL, numRequests: 32, contextTokens: 128, peers: { 'llama-cpp': 1.5, 'llama-cpp-q8': 1.5 } },
  { model: SMALL, numRequests: 8, contextTokens: 1024, peers: { 'llama-cpp': 2 } },
  { model: SMALL, numRequests: 8, contextTokens: 128, peers: { 'llama-cpp': 1.2, 'transformers-js': null } },
  { model: SMALL, numRequests: 1, contextTokens: 1024, peers: { 'llama-cpp': 0.7 } },
  { model: SMALL, numRequests: 1, contextTokens: 128, peers: { 'llama-cpp': 0.5, 'llama-cpp-q8': 0.5 } },
  // One request reads all weights for each token: here int4 is faster, and as wide as Q4_0.
  { model: SMALL, numRequests: 1, contextTokens: 1024, weights: 'int4', peers: { 'llama-cpp': 0.7 } },
  { model: SMALL, numRequests: 1, contextTokens: 128, weights: 'int4', peers: { 'llama-cpp': 0.5 } },
  { model: 'qwen2.5-0.5b', numRequests: 16, contextTokens: 1024, peers: { 'llama-cpp': 2 } },
  { model: 'qwen2.5-0.5b', numRequests: 1, contextTokens: 128, peers: { 'llama-cpp': 0.7 } },
  { model: 'qwen2.5-0.5b', numRequests: 1, contextTokens: 128, weights: 'int4', peers: { 'llama-cpp': 0.7 } },
];

/** What `--quick` measures: every contestant once, contexts as they are, fewer requests. */
const QUICK_CASES: readonly Case[] = [
  { model: SMALL, numRequests: 4, contextTokens: 256, peers: { 'llama-cpp': null, 'ort-loop': null } },
  { model: SMALL, numRequests: 2, contextTokens: 128, peers: { 'llama-cpp': null, 'transformers-js': null } },
  { model: SMALL, numRequests: 1, contextTokens: 128, peers: { 'llama-cpp': 0.5 } },
];

export async function decode(context: Context): Promise<Row[]> {
  let ours = new LaminaPeer();
  let oursWeights: Case['weights'];
  const peers = new Map<PeerName, RemotePeer>();
  const rows: Row[] = [];
  try {
    for (const { model, numRequests, contextTokens, weights, peers: wanted } of context.isQuick ? QUICK_CASES : CASES) {
      if (weights !== oursWeights) {
        await ours.dispose();
        ours = new LaminaPeer(weights === undefined ? {} : { settings: { weights } });
        oursWeights = weights;
      }
      const kinds = (['llama-cpp', 'llama-cpp-q8', 'ort-loop', 'transformers-js'] as const).filter(
        (kind) => wanted[kind] !== undefined,
      );
      const contestants = kinds.map((kind) => {
        const peer = peers.get(kind) ?? new RemotePeer(kind);
        peers.set(kind, peer);
        return peer;
      });
      const names = contestants.map((peer, i): RowName => {
        const mustReach = wanted[kinds[i]!] ?? null;
        const name = `${model} ${numRequests} x ${contextTokens}${weights === undefined ? '' : `, ${weights}`}`;
        return { part: 'decode', name, unit: 'tok/s', peerName: peer.name, mustReach };
      });
      const { threads, directory } = context;
      const maxNewTokens = tokensNeeded(context, contestants.length);
      const workload = { model, numRequests, contextTokens, maxNewTokens, threads, directory };
      rows.push(...(await measuredTogether(names, () => compareDecode(context, ours, contestants, workload))));
    }
    return rows;
  } finally {
    await ours.dispose();
    for (const peer of peers.values()) await peer.dispose();
  }
}
