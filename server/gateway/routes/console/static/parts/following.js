// Follows a training job to its end and reconnects as needed.
import { events, wasStopped } from '../api.js';

const MOST_LOSSES = 6;

export const ended = (job) => Boolean(job) && !['queued', 'running'].includes(job.state);

/** Follows a job; calls `tell` with every change, and `lost` with whether it is reconnecting. */
export async function follow(id, signal, tell, lost) {
	let last = null;
	for (let losses = 0; ;) {
		try {
			for await (const job of events('GET', `/jobs/${encodeURIComponent(id)}/events`, undefined, signal)) {
				losses = 0;
				lost(false);
				tell(last = job);
			}
			if (ended(last)) return last;
		} catch (error) {
			if (wasStopped(error) || (error.status >= 400 && error.status < 500) || ++losses > MOST_LOSSES) throw error;
			lost(true);
		}
		await new Promise((resolve) => setTimeout(resolve, 1000 * Math.max(1, losses)));
		signal.throwIfAborted();
	}
}
