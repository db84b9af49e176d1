// Few-shot training: samples, the loss during training, and answers before and after.
import { call, userPath, wasStopped } from '../api.js';
import { ask } from '../parts/asking.js';
import { Chart } from '../parts/chart.js';
import { ended, follow } from '../parts/following.js';
import { html, useEffect, useMemo, useRef, useState } from '../parts/html.js';
import { note } from '../parts/links.js';
import { Facts, Input, Notice, Says, UserId } from '../parts/widgets.js';
import { count, loss, titled } from '../parts/words.js';
import { readSamples } from '../reading/samples.js';
import { BeforeAfter, SampleInput } from './adapt_parts.js';

const STATES = {
	queued: 'Waiting for a worker',
	running: 'Training',
	succeeded: 'Succeeded: the adapter is served from now on',
	rejected: 'Rejected: the held-out loss did not fall, so the adapter is not served',
	failed: 'Failed',
	cancelled: 'Cancelled: the result is discarded',
	superseded: 'Superseded by a newer job of the same user',
};

export function Adapt({ params }) {
	const [user, setUser] = useState(params.get('user') ?? '');
	const [text, setText] = useState('');
	const [asked, setAsked] = useState('');
	const [steps, setSteps] = useState('');
	const [rows, setRows] = useState([]); // {question, before, after}
	const [phase, setPhase] = useState('idle'); // idle, before, training, after, done
	const [job, setJob] = useState(null);
	const [lost, setLost] = useState(false);
	const [fault, setFault] = useState(null);
	const [hint, setHint] = useState('');
	const run = useRef();
	const { samples, faults } = useMemo(() => readSamples(text), [text]);
	useEffect(() => {
		if (params.has('job')) watch(params.get('job'), restart());
		return () => run.current?.abort();
	}, []);

	function restart() {
		run.current?.abort();
		run.current = new AbortController();
		setFault(null);
		return run.current.signal;
	}

	async function start() {
		const signal = restart();
		const id = user.trim();
		const questions = asked.split('\n').map((line) => line.trim()).filter(Boolean);
		setJob(null);
		setHint('');
		setRows(questions.map((question) => ({ question })));
		try {
			setPhase('before');
			await answerAll(id, questions, 'before', signal);
			const config = steps ? { steps: Number(steps) } : {};
			const made = await call('POST', `${userPath(id)}/adapt`, { samples, config }, { signal });
			setJob(made);
			setHint(made.hint);
			note('adapt', { user: id, job: made.id });
			const last = await watch(made.id, signal);
			if (last?.state === 'succeeded') {
				setPhase('after');
				await answerAll(id, questions, 'after', signal);
			}
			setPhase('done');
		} catch (error) {
			stopped(error);
		}
	}

	async function watch(id, signal) {
		setPhase('training');
		try {
			const last = await follow(id, signal, setJob, setLost);
			setPhase('done');
			return last;
		} catch (error) {
			return stopped(error);
		}
	}

	function stopped(error) {
		setLost(false);
		if (wasStopped(error)) return;
		setPhase('done');
		setFault(error);
	}

	async function answerAll(id, questions, side, signal) {
		for (const [place, question] of questions.entries()) {
			const tell = (answer) => setRows((all) => all.map((row, index) => (index === place ? { ...row, [side]: answer } : row)));
			await ask({ user: id, prompt: question, maxTokens: 80, temperature: 0, history: 0, strength: 1 }, 'auto', signal, tell);
			signal.throwIfAborted();
		}
	}

	async function cancel() {
		try {
			setJob(await call('DELETE', `/jobs/${encodeURIComponent(job.id)}`));
		} catch (error) {
			setFault(error);
		}
	}

	const busy = ['before', 'training', 'after'].includes(phase);
	const submit = (event) => { event.preventDefault(); start(); };
	return html`
		<h1 tabindex="-1">Adapt</h1>
		<p class="lead">Train a small adapter for one user on samples of the answers they want. It is served only
			if it lowers the loss on held-out samples.</p>
		<form class="card ask" onSubmit=${submit}>
			<div>
				<${UserId} value=${user} onValue=${setUser} hint="A new user gets a profile made from the samples." />
				<${SampleInput} text=${text} onText=${setText} samples=${samples} faults=${faults} />
			</div>
			<div>
				<${Input} area rows="4" label="Questions to ask before and after" value=${asked} onValue=${setAsked}
					hint="One per line; optional." />
				<${Input} type="number" min="1" max="500" label="Steps at most" value=${steps} onValue=${setSteps}
					hint="Empty: the server decides." />
				<div class="actions">
					<button type="submit" class="main" disabled=${busy || !samples.length}>Train on ${count(samples.length, 'sample')}</button>
					${job && !ended(job) && html`<button type="button" onClick=${cancel}>Cancel training</button>`}
				</div>
				<${Notice} error=${fault} again=${job && !ended(job) ? () => watch(job.id, restart()) : undefined} />
			</div>
		</form>
		${phase === 'before' && html`<p class="dim" role="status">Asking the questions before training …</p>`}
		${hint && html`<${Notice} calm><${Says} text=${hint} /><//>`}
		${job && html`<${Training} job=${job} lost=${lost} />`}
		${rows.length > 0 && html`<${BeforeAfter} rows=${rows} />`}`;
}

function Training({ job, lost }) {
	const { step, steps, phase, loss: losses, held_out: held, runs = [] } = job.progress;
	const said = losses.length
		? `Training loss from ${loss(losses[0][1])} to ${loss(losses.at(-1)[1])}; held out ${held.map(([, value]) => loss(value)).join(', ')}`
		: 'No steps yet';
	const { before, after } = job.held_out ?? {};
	return html`<section class="card" aria-label="Training">
		<h2>Training</h2>
		<p role="status">${STATES[job.state] ?? job.state}${job.state === 'running' ? `: ${phase}` : ''}.
			${lost && ' The connection is lost; reconnecting …'}</p>
		${job.error && html`<${Notice} error=${{ message: job.error }} />`}
		${steps > 0 && html`<label class="progress">Step ${step} of ${steps}<progress value=${step} max=${steps}></progress></label>`}
		${losses.length > 0 && html`<${Chart} across="step" up="loss, nats per token" said=${said} runs=${runs.length ? runs : [[0, '']]} series=${[
			{ label: 'loss in training', points: losses },
			{ label: 'loss held out', points: held, dots: true },
		]} />`}
		<${Facts} label="Outcome" rows=${[
			['Held out, before', before != null && loss(before)],
			['Held out, after', after != null && loss(after)],
			['Adapter', job.adapter, true],
			['Job', job.id, true],
		].map(([name, value, mono]) => [name, value || null, mono])} />
		${job.shown && html`<article class="versus" aria-label="A held-out sample">
			<h3>${job.shown.input}</h3>
			<p class="hint">A sample that neither answer has been trained on; its own answer is “${job.shown.wanted}”</p>
			<div class="pair">${['before', 'after'].map((side) => html`<div key=${side}>
				<p class="dim">${titled(side)}</p><p class="text">${job.shown[side]}</p></div>`)}</div>
		</article>`}
	</section>`;
}
