/**
 * Owns the process of one peer: `host.js <name>`, calls over the IPC channel. A process each keeps one's threads and
 * memory out of another's figures.
 */
import type { Contestant } from './peer.ts';
import { PEER_NAMES, type PeerCall, type PeerName, type PeerReply } from './remote.ts';

const PEERS: Readonly<Record<PeerName, () => Promise<Contestant>>> = {
  'llama-cpp': async () => new (await import('./llama-cpp.ts')).LlamaCppPeer(PEER_NAMES['llama-cpp'], 'q4_0'),
  'llama-cpp-q8': async () => new (await import('./llama-cpp.ts')).LlamaCppPeer(PEER_NAMES['llama-cpp-q8'], 'q8_0'),
  'ort-loop': async () => new (await import('./ort-loop.ts')).OrtLoopPeer(),
  'transformers-js': async () => new (await import('./transformers-js.ts')).TransformersJsPeer(),
};

const [, make] = Object.entries(PEERS).find(([name]) => name === process.argv[2]) ?? [];
const peer = await make?.();

async function answer(call: PeerCall): Promise<PeerReply> {
  if (peer === undefined) return { error: `there is no peer ${process.argv[2]}` };
  try {
    if (call.method === 'open') return { opened: await peer.open(call.workload) };
    if (call.method === 'window') return { rate: await peer.window(call.limits) };
    await (call.method === 'close' ? peer.close() : peer.dispose());
    return {};
  } catch (cause) {
    return { error: cause instanceof Error ? cause.message : String(cause) };
  }
}

process.on('message', (call: PeerCall) => {
  void answer(call).then((reply) => process.send?.(reply));
});
process.on('disconnect', () => process.exit(0));
