// Live state of the server: parts from /ready, figures from /metrics.
import { call, text } from '../api.js';
import { html, useEffect, useRef, useState } from '../parts/html.js';
import { Figures } from '../parts/figures.js';
import { Notice, Says } from '../parts/widgets.js';
import { figure } from '../parts/words.js';
import { parseMetrics } from '../reading/metrics.js';

const EVERY_MS = 2000;
const LOOK_MS = 5000;
const MINUTE_S = 60;
const KEPT = 90; // readings: three minutes

const STATES = {
	ready: 'Ready: requests are answered in full.',
	not_ready: 'Not ready: a part that every request needs is missing.',
	not_yet_seen: 'Starting: the parts have not been probed yet.',
	stale: 'Unknown: the last probe of the parts is too old.',
};

export function System() {
	const [ready, setReady] = useState(null);
	const [fault, setFault] = useState(null);
	const [live, setLive] = useState(true);
	const [readings, setReadings] = useState([]);
	const asking = useRef();
	useEffect(() => {
		if (!live) return undefined;
		let timer;
		asking.current = new AbortController();
		const paused = asking.current.signal;
		const look = async () => {
			if (document.hidden) {
				timer = setTimeout(look, EVERY_MS);
				return;
			}
			const signal = AbortSignal.any([paused, AbortSignal.timeout(LOOK_MS)]);
			try {
				const [seen, told] = await Promise.all([
					call('GET', '/ready', undefined, { signal, also: [503] }),
					text('/metrics', signal),
				]);
				setReady(seen);
				setReadings((all) => [...all, { at: performance.now(), ...parseMetrics(told) }].slice(-KEPT));
				setFault(null);
			} catch (error) {
				if (paused.aborted) return;
				setReady(null);
				setFault(error);
			}
			timer = setTimeout(look, EVERY_MS);
		};
		look();
		return () => { clearTimeout(timer); asking.current.abort(); };
	}, [live]);
	const covered = readings.length ? Math.round((readings.at(-1).at - readings[0].at) / 1000) : 0;
	return html`
		<h1 tabindex="-1">System</h1>
		<div class="actions">
			<p class="dim">${live ? 'Live, every two seconds' : 'Paused'}; rates and times cover
				${' '}${covered < MINUTE_S ? `the ${covered} seconds since this page was opened` : 'the last minute'}.</p>
			<button type="button" class="quiet" aria-pressed=${!live} onClick=${() => setLive(!live)}>${live ? 'Pause' : 'Go on'}</button>
		</div>
		<${Notice} error=${fault} />
		${!ready && !fault && html`<p class="dim" role="status">Looking …</p>`}
		${readings.length > 0 && html`<${Figures} readings=${readings} />`}
		${ready && html`<${Parts} ready=${ready} />`}`;
}

function Parts({ ready: { status, detail, seen_s_ago: seen, parts } }) {
	const { bank, embedder, redis, engine_url: address, engines } = parts;
	const rows = [
		['Bank', bank, `${bank.fingerprint.slice(0, 8)}, ${bank.anchors} anchors, task ${bank.task}`],
		['Embedder', embedder, `${embedder.id.slice(0, 12)}, ${embedder.dim} numbers`],
		['Store', redis, redis.durability && `durable by ${redis.durability}`],
		['Generating address', address, address.url],
		...engines.map((engine) => ['Engine', engine, `${engine.url}${engine.max_model_len ? `, context of ${engine.max_model_len} tokens` : ''}`]),
	];
	return html`<section class="card" aria-label="Parts">
		<h2>Parts</h2>
		<p role="status">${STATES[status] ?? status} ${detail && html`<${Says} text=${detail} />`}</p>
		<ul class="parts">${rows.map(([name, part, more], index) => html`<li key=${index} class=${part.status === 'ok' ? 'ok' : 'off'}>
			<span class="dot" aria-hidden="true"></span>
			<span><strong>${name}</strong> ${part.status.replaceAll('_', ' ')}</span>
			<p class="dim">${more}</p>
			${part.detail && html`<p class="dim"><${Says} text=${part.detail} /></p>`}
		</li>`)}</ul>
		${seen != null && html`<p class="hint">Probed ${figure(seen)} s ago.</p>`}
	</section>`;
}
