/**
 * Owns `lamina start`: a cluster that stays up until it is told to end.
 *
 * Invariants
 * 1. The first line on stdout is `ready <nats url> <http url>`, written once a prompt would be answered.
 */
import { SETTINGS } from '@lamina/runtime';
import type { Cluster } from './cluster.ts';

function describeCluster({ natsUrl, httpUrl, passwords }: Cluster): string {
  const asService = passwords === undefined ? '' : ` ${SETTINGS.natsPasswordFile.env}=${passwords}`;
  return `ready ${natsUrl} ${httpUrl}

  publish a prompt     nats req --replies=0 lamina.v1.generate "Once upon a time" --server ${natsUrl}
  health and metrics   curl ${httpUrl}/health    curl ${httpUrl}/metrics
  add a shard          ${SETTINGS.natsUrl.env}=${natsUrl}${asService} node services/attention-shard/dist/main.js
  stop                 Ctrl-C
`;
}

export async function runStart(cluster: Cluster, interrupted: Promise<void>): Promise<number> {
  process.stdout.write(describeCluster(cluster));
  await interrupted;
  return 0;
}
