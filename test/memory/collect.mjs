/**
 * Loaded first by Node processes whose memory is judged: on SIGUSR2 each of its threads collects its whole heap and gives free pages
 * back. What is resident then is what the process holds, not what V8 has not collected yet.
 */
import { Session } from 'node:inspector';
import process from 'node:process';
import { BroadcastChannel, isMainThread } from 'node:worker_threads';

const session = new Session();
session.connect();
const collect = () => session.post('HeapProfiler.collectGarbage');
const channel = new BroadcastChannel('lamina-collect');
channel.onmessage = collect;
channel.unref();
if (isMainThread)
  process.on('SIGUSR2', () => {
    collect();
    channel.postMessage(null);
  });
