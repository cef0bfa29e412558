# What the extension uses of C: the kernels' jobs (kernels/job.h), one function of NumPy, and the runtime (threads,
# who else uses the CPUs).

cdef extern from "kernels/job.h" nogil:
    ctypedef enum bnfast_dtype:
        BNFAST_FLOAT32
        BNFAST_FLOAT64
        BNFAST_FLOAT16
        BNFAST_BFLOAT16
        BNFAST_N_DTYPES

    ctypedef struct bnfast_kernels:
        const char *isa
        Py_ssize_t marks_per_byte
        Py_ssize_t coefficient_size
        void (*widen_values)(Py_ssize_t n, const void *x, void *out) noexcept nogil
        void (*narrow_values)(Py_ssize_t n, const void *values, void *out) noexcept nogil
        void (*round_values)(Py_ssize_t n, const double *values, void *out) noexcept nogil
        Py_ssize_t (*usable_variances)(Py_ssize_t n, const bnfast_parameter *var, double eps) noexcept nogil
        int lift_exponent

    const bnfast_kernels *bnfast_active(bnfast_dtype dtype) noexcept
    const bnfast_kernels *bnfast_of_same_isa(const bnfast_kernels *kernels, bnfast_dtype dtype) noexcept
    int bnfast_select(const char *isa) noexcept
    const char *bnfast_isa_name(int i) noexcept
    int bnfast_isa_compiled(int i) noexcept
    int bnfast_isa_supported(int i) noexcept
    void bnfast_read_caches() noexcept
    void bnfast_set_caches(Py_ssize_t l2, Py_ssize_t last_level) noexcept
    Py_ssize_t bnfast_l2_bytes() noexcept
    Py_ssize_t bnfast_last_level_bytes() noexcept

    enum:
        BNFAST_MARKS_PAD

    ctypedef enum bnfast_operation:
        BNFAST_MOMENTS
        BNFAST_FORWARD
        BNFAST_EVAL
        BNFAST_BACKWARD
        BNFAST_BACKWARD_EVAL
        BNFAST_BACKWARD_SUMS
        BNFAST_BACKWARD_APPLY
        BNFAST_FLOOR
        BNFAST_JVP
        BNFAST_LIFT
        BNFAST_LOWER

    ctypedef struct bnfast_job

    ctypedef struct bnfast_parameter:
        const double *wide
        const float *narrow

    ctypedef struct bnfast_rectifier:
        double slope, top

    ctypedef struct bnfast_phase:
        void (*task)(const bnfast_job *job, Py_ssize_t index, int thread) noexcept nogil
        Py_ssize_t n_tasks
        int backwards

    ctypedef enum bnfast_plan_kind:
        BNFAST_PHASES
        BNFAST_BLOCKS

    ctypedef struct bnfast_job:
        const bnfast_kernels *kernels
        bnfast_operation operation
        Py_ssize_t outer, channels, inner
        const void *x
        const void *u
        const void *residual
        void *passed
        unsigned char *marks
        Py_ssize_t first_mark
        void *out
        int rectifies
        bnfast_rectifier rectifier
        bnfast_parameter gamma
        bnfast_parameter beta
        bnfast_parameter vgamma
        bnfast_parameter vbeta
        const double *var
        double eps
        double *mean
        double *inv_std
        double *m2
        const float *narrow_mean
        const float *narrow_inv_std
        const float *narrow_var
        int exact
        double *mean_rest
        double *dbeta
        double *dgamma
        float *narrow_dbeta
        float *narrow_dgamma
        double count
        int *infinite
        unsigned char *lifted
        int n_threads
        bnfast_plan_kind kind
        Py_ssize_t n_segments, segment_rows, segment_length, fold, block_channels, task_channels
        int near, pack, written_later, asked_for, row_by_row, in_order, stream
        Py_ssize_t workspace_bytes
        int n_phases
        bnfast_phase *phases
        char *workspace

    Py_ssize_t bnfast_threads_worth(const bnfast_job *job) noexcept
    int bnfast_last_level_is_far() noexcept
    void bnfast_plan(bnfast_job *job) noexcept
    int bnfast_is_subnormal(const bnfast_job *job) noexcept
    int bnfast_is_planar(const bnfast_job *job) noexcept

    ctypedef struct bnfast_choices:
        int kind, stream, near, pack, written_later, row_by_row, in_order
    void bnfast_force(const bnfast_choices *choices) noexcept

cdef extern from "numpy/arrayobject.h":
    cnp.ndarray PyArray_NewLikeArray(cnp.ndarray prototype, cnp.NPY_ORDER order, void *dtype, int subok)
    cnp.ndarray PyArray_View(cnp.ndarray array, void *dtype, void *type)

cdef extern from "runtime/openmp.h" nogil:
    long bnfast_openmp_version() noexcept
    const char *bnfast_openmp_library() noexcept
    int bnfast_openmp_max_threads() noexcept
    int bnfast_openmp_thread_limit() noexcept
    void bnfast_openmp_init() noexcept
    int bnfast_openmp_fork_handled() noexcept
    void bnfast_openmp_handle_fork(int on) noexcept
    int bnfast_openmp_forked_serial() noexcept
    int bnfast_openmp_enter(int budget) noexcept
    void bnfast_openmp_leave(int budget, int team) noexcept
    int bnfast_openmp_take_shortage() noexcept
    unsigned long long bnfast_float_control() noexcept
    void bnfast_set_float_control(unsigned long long control) noexcept

cdef extern from "runtime/budget.h" nogil:
    ctypedef struct bnfast_facts:
        long context, process, environment
        int omp_num_threads_is_set
        long openmp
        long limit
        int has_openmp, forked_serial
        long cpus

    ctypedef struct bnfast_budget:
        long n
        int why
        int chosen
        int in_code

    bnfast_budget bnfast_decide(const bnfast_facts *facts) noexcept
    bnfast_budget bnfast_budget_now(long context) noexcept
    void bnfast_set_process_threads(long n) noexcept
    void bnfast_set_environment_threads(long n, int omp_num_threads_is_set) noexcept
    int bnfast_cpus_are_old() noexcept
    void bnfast_set_cpus(long n) noexcept
    void bnfast_age_cpus(long long nanoseconds) noexcept
    void bnfast_forget_cpus() noexcept

cdef extern from "runtime/late.h" nogil:
    void bnfast_late_init() noexcept
    void bnfast_late_region_begins() noexcept
    void bnfast_late_nothing_left(int thread, Py_ssize_t tasks) noexcept
    void bnfast_late_region_ends() noexcept
    int bnfast_late_better_alone(long long elements) noexcept
    void bnfast_late_pretend(long long task, long long waited) noexcept
    void bnfast_late_set_patience(long long microseconds) noexcept

cdef extern from "runtime/waking.h" nogil:
    void bnfast_waking_init(long spin_count) noexcept
    int bnfast_waking_pays(long long elements) noexcept
    void bnfast_waking_pretend(long long nanoseconds, long long elements) noexcept
    long long bnfast_waking_awake() noexcept

cdef extern from "runtime/shares.h" nogil:
    ctypedef struct bnfast_share:
        pass

    void bnfast_share_out(bnfast_share *shares, int n_shares, Py_ssize_t n_tasks, int backwards) noexcept
    Py_ssize_t bnfast_take(bnfast_share *share) noexcept

cdef extern from "runtime/gate.h" nogil:
    ctypedef struct bnfast_gate:
        pass

    void bnfast_gate_close(bnfast_gate *gate) noexcept
    void bnfast_gate_note(bnfast_gate *gate) noexcept
    void bnfast_gate_pass(bnfast_gate *gate, Py_ssize_t n_tasks) noexcept

cdef extern from "runtime/rivals.h" nogil:
    void bnfast_rivals_init() noexcept
    void bnfast_rivals_exclude_me() noexcept
    int bnfast_rivals_leave(int team, long long elements) noexcept
